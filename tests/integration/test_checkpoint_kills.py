"""A rank is killed at a random moment of a save: the newest whole checkpoint is good, and nothing older is lost.

The ranks are processes that do nothing but save; a fork server keeps thirty rounds cheap.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aroface.config.engine import CheckpointConfig
from aroface.engine.checkpoint import Snapshot, TensorFile
from aroface.engine.checkpoint_layout import newest_valid, start_checkpoint, step_of, torn_saves
from aroface.engine.saver import write_snapshot
from tests.helpers.needs import missing

ROUNDS, EVERY, VALUES = 30, 5, 200_000
CONFIG = CheckpointConfig(keep_last=2)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def contents(step, rank):
    files = {f"head-{rank:05d}-of-00002.safetensors": TensorFile({"weight": torch.full((VALUES,), step + 0.5)}, {})}
    if rank == 0:
        files["backbone.safetensors"] = TensorFile({"w": torch.full((VALUES,), float(step))}, {})
        files["optimizer.safetensors"] = TensorFile({"w": torch.full((VALUES,), -float(step))}, {})
    return Snapshot(step, rank, 2, files, {"step": step} if rank == 0 else None)


def save_for_ever(run, rank, together, begun, done):
    torch.set_num_threads(1)
    step = 0
    while True:
        step += EVERY
        if rank == 0:
            start_checkpoint(run, step)
        together.wait()
        begun.value = step
        write_snapshot(contents(step, rank), run, CONFIG)
        together.wait()
        done.value = step


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_one(run, context, chance):
    """Saves until one rank, drawn, is killed at a drawn moment; returns (last step known done, step begun)."""
    together = context.Barrier(2)
    # Without locks, which a rank that is killed at the wrong moment would hold for ever.
    begun, done = context.Value("i", 0, lock=False), context.Value("i", 0, lock=False)
    processes = [
        context.Process(target=save_for_ever, args=(run, rank, together, begun, done), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        wait_until(lambda: done.value >= EVERY)
        started = time.monotonic()
        wait_until(lambda: done.value >= 2 * EVERY)
        duration_s = time.monotonic() - started
        time.sleep(chance.uniform(0, 2 * duration_s))
        victim = chance.choice(processes)
        os.kill(victim.pid, signal.SIGKILL)
        finished = done.value
        victim.join(60)
    finally:  # as a launcher does
        for process in processes:
            process.kill()
            process.join(60)
    return finished, begun.value


def test_thirty_kills(tmp_path, caplog):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "aroface.engine.saver"])
    chance, torn_seen = random.Random(20), 0
    for number in range(ROUNDS):
        run = tmp_path / str(number)
        run.mkdir()
        finished, begun = kill_one(run, context, chance)
        caplog.clear()
        newest = newest_valid(run)
        assert newest is not None
        step = step_of(newest)
        assert step >= finished
        assert begun - step <= EVERY, "no more is lost than the interval before the save"
        for path in newest.glob("*.safetensors"):
            sign = -1.0 if path.name.startswith("optimizer") else 1.0
            values = next(iter(load_file(path).values()))
            assert torch.equal(values, torch.full((VALUES,), sign * step + 0.5 * path.name.startswith("head")))
        for torn in torn_saves(run):
            torn_seen += 1
            assert f"Passing over {torn}: a save that was cut short" in caplog.text
        again = begun + EVERY
        for rank in (1, 0):  # a new life saves as if nothing had been
            if rank:
                start_checkpoint(run, again)
            write_snapshot(contents(again, rank), run, CONFIG)
        assert newest_valid(run) == run / f"step-{again:08d}"
    assert torn_seen > ROUNDS // 4, "the kills fell into saves"


SCRIPT = """
mount -t tmpfs -o size=3m tmpfs "$1" || exit 77
"$2" -m launch train "$3" "data.shards=$4" schedule.epochs=20 checkpoint.every_steps=2 checkpoint.keep_last=99 \\
    --run "$1/run" 2> "$5"
code=$?
"$2" -m launch checkpoint verify "$1/run" > "$6"
echo "train $code, verify $?"
"""


def test_a_full_disk_keeps_the_old_checkpoints_and_says_so(tmp_path, drawn_shards):
    """A real one, in a mount namespace of its own."""
    root = Path(__file__).parents[2]
    disk, told, verified = tmp_path / "disk", tmp_path / "told", tmp_path / "verified"
    disk.mkdir()
    config = root / "configs" / "smoke" / "tiny.yaml"
    arguments = [disk, sys.executable, config, drawn_shards, told, verified]
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        missing("this system has no mount namespaces for us")
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SCRIPT, "sh", *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if result.returncode == 77:
        missing("no tmpfs may be mounted here")
    assert "train 2, verify 0" in result.stdout, told.read_text()
    assert "No space left on device" in told.read_text()
    assert any(words in told.read_text() for words in ("is as it was", "metrics.jsonl cannot be written"))
    assert "Traceback" not in told.read_text()
    assert ": whole" in verified.read_text()
    assert "DAMAGED" not in verified.read_text()
