"""The check before a job: what nodes must agree on, and that nobody waits for ever."""

import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.cluster.hosts import Host
from launch.cluster.node_report import NodeReport, disagreements, examine_node
from launch.cluster.preflight import PreflightError, preflight
from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic

CONFIG = Path(__file__).parents[3] / "configs" / "smoke" / "tiny.yaml"
GOOD = NodeReport(
    0,
    "alpha",
    {"python": "3.11", "torch": "2.6", "commit": "abc", "device": "cuda"},
    config_sha256="c" * 64,
    data_sha256="d" * 64,
)
OTHER = replace(GOOD, node_rank=1, host="beta")


@pytest.fixture(scope="module")
def drawn_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    write_synthetic(folder / "faces", identities=12, images_per_identity=2, seed=0)
    pack(folder / "faces", folder / "shards", PackOptions())
    return folder / "shards"


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_equal_reports_agree_and_survive_the_wire():
    assert disagreements([GOOD, NodeReport.load(OTHER.dump())]) == []
    assert NodeReport.load(OTHER.dump()) == OTHER


@pytest.mark.parametrize(
    ("change", "what", "advice"),
    [
        ({"versions": {**GOOD.versions, "torch": "2.7"}}, "torch differs: 2.6 on node 0 (alpha); 2.7", "same version"),
        ({"versions": {**GOOD.versions, "commit": "abd"}}, "commit differs", "check out the same commit"),
        ({"versions": {**GOOD.versions, "device": "cpu"}}, "device differs: cuda on node 0 (alpha); cpu", "nvidia-smi"),
        ({"config_sha256": "e" * 64}, "configuration differs", "the same file and the same overrides"),
        ({"data_sha256": "e" * 64}, "manifest of the shards differs", "copy the shards again"),
        ({"problems": ["the disk is full; free some"]}, "node 1 (beta): the disk is full", "free some"),
    ],
)  # fmt: skip
def test_every_disagreement_names_the_nodes_and_the_way_out(change, what, advice):
    (line,) = disagreements([GOOD, replace(OTHER, **change)])
    assert what in line
    assert "node 1 (beta)" in line
    assert advice in line


def test_what_a_node_could_not_find_out_is_told_once():
    lost = replace(OTHER, data_sha256="", problems=["shards/manifest.json is missing"])
    assert disagreements([GOOD, lost]) == ["node 1 (beta): shards/manifest.json is missing"]


def meet(run, shards, *, nodes, ranks, timeout_s=20.0, port=None):
    hosts = [Host("localhost", 1)] * nodes
    overrides = [f"data.shards={shards}"]
    port = port or free_port()

    def one(rank):
        return preflight(
            *(CONFIG, overrides, run),
            hosts=hosts,
            node_rank=rank,
            master_addr="127.0.0.1",
            master_port=port,
            timeout_s=timeout_s,
        )

    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in ranks]]


def test_three_nodes_meet_and_leave_nothing_behind(tmp_path, drawn_shards):
    run = tmp_path / "runs" / "run"
    reports = meet(run, drawn_shards, nodes=3, ranks=(0, 1, 2))
    assert [[report.node_rank for report in seen] for seen in reports] == [[0, 1, 2]] * 3
    assert {report.num_classes for seen in reports for report in seen} == {12}
    assert list(run.parent.iterdir()) == []


def test_a_node_that_does_not_come_is_named(tmp_path, drawn_shards):
    with pytest.raises(PreflightError, match=r"No word from node 1 \(localhost\) within 1 s.*Start the job there"):
        meet(tmp_path / "run", drawn_shards, nodes=2, ranks=(0,), timeout_s=1)


def test_a_master_that_does_not_answer_is_named(tmp_path, drawn_shards):
    with pytest.raises(
        PreflightError, match=r"does not reach the master at 127.0.0.1:\d+ within 1 s.*Is node 0 started"
    ):
        meet(tmp_path / "run", drawn_shards, nodes=2, ranks=(1,), timeout_s=1)


def test_torchrun_meets_nodes_whose_names_it_is_not_told(tmp_path, drawn_shards):
    """The command as it is given on both nodes, up to the training."""
    words = [sys.executable, "-m", "launch", "launch", str(CONFIG), f"data.shards={drawn_shards}"]
    words += ["--run", str(tmp_path / "run"), "--launcher", "torchrun", "--nodes", "2", "--gpus-per-node", "1"]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--preflight-only"]
    processes = [
        subprocess.Popen([*words, "--node-rank", str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    told = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "2 node(s) ready" in told[0]


def examine(shards, run, **changes):
    settings = {"node_rank": 0, "slots": [1], "names": ["localhost"]} | changes
    return examine_node(CONFIG, [f"data.shards={shards}"], run, **settings)


def test_a_node_tells_what_is_wrong_with_it(tmp_path, drawn_shards, monkeypatch):
    good = examine(drawn_shards, tmp_path / "run")
    assert good.problems == []
    assert good.versions["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    (problem,) = examine(drawn_shards, tmp_path / "run", names=["no-such-host.invalid"]).problems
    assert "no-such-host.invalid does not resolve here" in problem
    (problem,) = examine(drawn_shards, tmp_path / "run", slots=[8, 8]).problems
    assert "12 classes cannot be shared out over 16 ranks" in problem
    (problem,) = examine(tmp_path / "none", tmp_path / "run").problems
    assert "aroface pack" in problem
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    (problem,) = examine(drawn_shards, tmp_path / "run").problems
    assert "0.00 GiB are free" in problem
    assert "lower checkpoint.keep_last" in problem


def test_a_shard_that_was_cut_short_is_named(tmp_path, drawn_shards):
    copy = tmp_path / "copy"
    shutil.copytree(drawn_shards, copy)
    tar = next(copy.glob("*.tar"))
    with tar.open("r+b") as file:
        file.truncate(1024)
    (problem,) = examine(copy, tmp_path / "run").problems
    assert tar.name in problem
    assert "copy it again" in problem
