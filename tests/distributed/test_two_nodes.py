"""Two nodes with addresses of their own: they train together, one is lost, and the same command goes on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic
from tests.helpers.namespaces import two_nodes

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smoke" / "tiny.yaml"
STEPS = 27
SETTINGS = ("schedule.epochs=6", "checkpoint.every_steps=5", "engine.zero_stage=2")
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    for seed, name in enumerate(("shards", "other")):
        write_synthetic(folder / f"faces-{name}", identities=12, images_per_identity=6, seed=seed)
        pack(folder / f"faces-{name}", folder / name, PackOptions())
    return folder / "shards"


@pytest.fixture
def hostfile(tmp_path, nodes):
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    return path


def command(shards, run, *options):
    settings = [f"data.shards={shards}", *SETTINGS]
    return [sys.executable, "-m", "launch", "launch", str(CONFIG), *settings, "--run", str(run), *options]


def start(node, words, log):
    with log.open("a") as file:
        return subprocess.Popen(
            node.words(*words), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )


def start_both(nodes, shards, run, hostfile, *options):
    return [
        start(
            node,
            command(
                shards, run, "--hostfile", str(hostfile), "--launcher", "no-ssh", "--node-rank", str(rank), *options
            ),
            hostfile.parent / f"node-{rank}.log",
        )
        for rank, node in enumerate(nodes)
    ]


def lines(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(condition, seconds, processes):
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "a launcher ended early"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_lost_node_ends_the_job_and_the_same_command_goes_on(tmp_path, nodes, shards, hostfile):
    run = tmp_path / "run"
    processes = start_both(nodes, shards, run, hostfile)
    wait_for(lambda: len(lines(run)) >= 8, 120, processes)
    nodes[1].kill()
    assert processes[0].wait(timeout=60) not in (0, None)
    assert nodes[0].processes() == []
    assert 8 <= len(lines(run)) < STEPS

    processes = start_both(nodes, shards, run, hostfile, "--no-preflight")
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert f"finished step {STEPS} of {STEPS}" in (tmp_path / "node-0.log").read_text()
    assert "Resumed from" in (tmp_path / "node-0.log").read_text()
    steps = [line["step"] for line in lines(run)]
    assert steps == list(range(1, STEPS + 1))

    # The reference: both ranks on this machine, under torchrun, never interrupted.
    whole = subprocess.run(
        command(shards, tmp_path / "whole", "--gpus-per-node", "2", "--no-preflight"),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"},
        timeout=120,
        check=True,
        capture_output=True,
    )
    assert b"finished" in whole.stdout
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(tmp_path / "whole")]
