"""What goes wrong on one of two ranks: nobody is left waiting, nothing bad is applied, and the run goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aroface.distributed import AnyRankLater
from aroface.engine import run_directory
from aroface.engine.trainer import Trainer
from aroface.errors import ArofaceError
from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic
from tests.helpers.ranks import run_on_ranks
from tests.helpers.training import COMPARABLE, PARTITIONED, DrawnData, config_of, train

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smoke" / "tiny.yaml"
ENDLESS = ("schedule.epochs=100000", "checkpoint.every_steps=5", "log.every_steps=1")
PATIENCE_S = 300

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_synthetic(folder / "faces", identities=12, images_per_identity=6, seed=0)
    pack(folder / "faces", folder / "shards", PackOptions())
    return folder / "shards"


@contextmanager
def two_ranks(run, shards, *settings, options=()):
    """The training on two ranks, as processes; killed at the end whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", "train", str(CONFIG), f"data.shards={shards}", *settings]
    processes = [
        subprocess.Popen(
            [*command, "--run", str(run), *options],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(condition, processes):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "a rank ended before its time"
        time.sleep(0.05)


def steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_a_killed_rank_ends_the_job_and_the_run_goes_on(tmp_path, shards):
    run = tmp_path / "run"
    with two_ranks(run, shards, *ENDLESS) as (first, second):
        wait_for(lambda: len(list(run.glob("step-*"))) >= 2, (first, second))
        second.send_signal(signal.SIGKILL)
        _, told = first.communicate(timeout=PATIENCE_S)
        assert first.returncode == 2
        assert "lost the other ranks after step" in told
        assert "give the same command again to continue" in told
    reached = steps(run)[-1]
    with two_ranks(run, shards, *ENDLESS) as processes:
        wait_for(lambda: steps(run) and steps(run)[-1] >= reached + 1, processes)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        resumed = int(told[0].split("at step ")[1].split(" ")[0])
        # the save before the kill may have been under way: the interval, and the steps that ran beside it
        assert reached - resumed <= 2 * 5
    last = sorted(run.glob("step-*"))[-1]
    assert json.loads((last / "state.json").read_text())["step"] == steps(run)[-1]


def test_a_hung_rank_ends_the_job_within_the_set_time(tmp_path, shards):
    run = tmp_path / "run"
    with two_ranks(run, shards, *ENDLESS, "engine.timeout_s=20") as (first, second):
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps(run)) >= 2, (first, second))
        second.send_signal(signal.SIGSTOP)
        _, told = first.communicate(timeout=PATIENCE_S)
        assert first.returncode == 2
        assert "engine.timeout_s = 20 s" in told or "2 x engine.timeout_s" in told
        second.send_signal(signal.SIGCONT)
        second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 2


def test_never_does_not_trip_over_the_files_of_the_other_rank(tmp_path, shards):
    with two_ranks(tmp_path / "run", shards, "schedule.epochs=1", options=("--resume", "never")) as processes:
        for process in processes:
            process.communicate(timeout=PATIENCE_S)
        assert [process.returncode for process in processes] == [0, 0]


def resumed(rank, ranks, run, resume):
    """Rank 1 sees no whole checkpoint, as over a slow network file system; which step the run goes on from."""
    if rank == 1:
        run_directory.newest_valid = lambda run: None
    try:
        return Trainer(config_of(*COMPARABLE), DrawnData(), run, resume=resume).position.step
    except ArofaceError as error:
        return str(error)


def test_the_first_rank_chooses_the_checkpoint_for_all(tmp_path):
    train(tmp_path / "run", *COMPARABLE, stop_after=3)
    assert run_on_ranks(resumed, 2, tmp_path / "run", "auto", timeout_s=300) == [3, 3]
    told = run_on_ranks(resumed, 2, tmp_path / "run", "never", timeout_s=300)
    assert told[0] == told[1]
    assert "is not empty and --resume never starts afresh" in told[0]


def alone(shards, run, port, *settings):
    """Rank 0 of two, whose companion is never started; exit code and what it said."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
    words = [
        sys.executable,
        "-m",
        "launch",
        "train",
        str(CONFIG),
        f"data.shards={shards}",
        *settings,
        "--run",
        str(run),
    ]
    result = subprocess.run(
        words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return result.returncode, result.stderr


def test_a_port_in_use_is_named_where_no_launcher_looked(tmp_path, shards):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, told = alone(shards, tmp_path / "run", port)
    assert code == 2, told
    assert f"Port {port} of 127.0.0.1 is in use" in told
    assert "Traceback" not in told


def test_a_rank_that_does_not_come_is_missed_within_the_set_time(tmp_path, shards):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code, told = alone(shards, tmp_path / "run", port, "engine.timeout_s=3")
    assert code == 2, told
    assert "Rank 0 did not find the other ranks, or lost them, before the first step" in told
    assert "Traceback" not in told


def one_bad_gradient(rank, ranks, root, stage):
    """Infinity in the first gradient of rank 1 alone; returns what was told, and what changed."""
    trainer = Trainer(
        config_of(*COMPARABLE, PARTITIONED, f"engine.zero_stage={stage}"), DrawnData(), root, resume="auto"
    )
    engine, head = trainer._engine, trainer._head
    before, centres = engine.weights(settle=False), head.weight.detach().clone()
    gradients = engine.gradients

    def spoilt():
        parts = gradients()
        if rank == 1:
            parts[0].view(-1)[0] = torch.inf
        return parts

    engine.gradients = spoilt
    try:
        trainer.train()
        told = "went on"
    except ArofaceError as error:
        told = str(error)
    after = engine.weights(settle=False)
    return (
        told,
        [name for name in before if not torch.equal(before[name], after[name])],
        torch.equal(centres, head.weight),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_and_changes_nothing(tmp_path, stage):
    for told, changed, has_same_centres in run_on_ranks(one_bad_gradient, 2, tmp_path / "run", stage, timeout_s=300):
        assert "Step 1: the gradient of the backbone is not finite" in told
        assert changed == []
        assert has_same_centres


def diverge(rank, ranks, root):
    """A rate that blows the weights up at the first step, so that the second loss is not finite."""
    found = {}
    for stage in (0, 1, 2, 3):
        wild = ("optim.lr_per_1024=1e38", "optim.clip_norm=null", "checkpoint.every_steps=1")
        try:
            train(root / str(stage), *COMPARABLE, PARTITIONED, *wild, f"engine.zero_stage={stage}")
            found[stage] = "went on"
        except ArofaceError as error:
            found[stage] = str(error)
    return found


def test_a_loss_that_is_not_finite_stops_both_ranks_before_the_update(tmp_path):
    results = run_on_ranks(diverge, 2, tmp_path, timeout_s=600)
    for stage in (0, 1, 2, 3):
        names = []
        for rank, result in enumerate(results):
            assert "is not finite" in result[stage]
            assert f"on rank {rank}" in result[stage]
            names.append(result[stage].split("begins with ")[1].split(". Look")[0])
            assert names[-1].startswith("drawn: ")
        assert names[0] != names[1]
        step = {result[stage].split(":")[0] for result in results}
        assert len(step) == 1
        for directory in (tmp_path / str(stage)).glob("step-*"):
            weights = load_file(directory / "optimizer.safetensors").values()
            assert all(torch.isfinite(value).all() for value in weights)


def stop_on_one(rank, ranks, root):
    """As on GPUs: answers come a step later. Rank 1 alone is told to stop, after its second step."""
    settings = (*COMPARABLE, "checkpoint.every_steps=100", "log.every_steps=100")
    trainer = Trainer(config_of(*settings), DrawnData(), root, resume="auto")
    trainer._ask = AnyRankLater()
    step = trainer._step

    def counted(*args):
        result = step(*args)
        if rank == 1 and trainer.position.step == 2:
            trainer.request_stop()
        return result

    trainer._step = counted
    result = trainer.train()
    return result.position.step, result.was_interrupted


def test_a_stop_that_is_answered_a_step_later_is_one_on_both_ranks(tmp_path):
    assert run_on_ranks(stop_on_one, 2, tmp_path / "run", timeout_s=300) == [(3, True), (3, True)]
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000003"]
