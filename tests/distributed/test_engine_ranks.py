"""The trainer on two gloo ranks, through the command: ZeRO stages agree, a resume is exact, nobody is left waiting."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smoke" / "tiny.yaml"
# No draws per rank and no rounding to bf16, so that runs can be compared.
PLAIN = ("engine.precision=fp32", "alignment.kind=none", "data.augment={}", "data.augment.flip=0", "schedule.epochs=1")
# Small parameters are partitioned too; by default DeepSpeed keeps them whole and stage 3 would not be exercised.
PARTITIONED = "engine.deepspeed_extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_synthetic(folder / "faces", identities=12, images_per_identity=6, seed=0)
    pack(folder / "faces", folder / "shards", PackOptions())
    return folder / "shards"


def train(run, shards, *settings, options=(), ranks=2):
    """Exit codes of all ranks; a rank that hangs fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", "train", str(CONFIG), f"data.shards={shards}", *settings]
    processes = [
        subprocess.Popen(
            [*command, "--run", str(run), *options],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    try:
        return [process.wait(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()


def tensors(directory):
    return {
        f"{path.name}/{k}": v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree_with_stage_0(tmp_path, shards, stage):
    for name, number in (("plain", 0), ("zero", stage)):
        assert train(tmp_path / name, shards, *PLAIN, PARTITIONED, f"engine.zero_stage={number}") == [0, 0]
    plain, zero = (tensors(tmp_path / name / "step-00000005") for name in ("plain", "zero"))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in zero.items()}
    for name, value in plain.items():
        # the same fp32 sums in another order
        torch.testing.assert_close(zero[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adversarial", "delayed"])
def test_2n_steps_are_n_steps_and_a_resume_bit_for_bit(tmp_path, shards, kind):
    """At the same two ranks, with attack, augmentation, AdaFace statistics and bf16, running statistics included."""
    settings = (f"alignment.kind={kind}", "alignment.share=0.25")
    assert train(tmp_path / "whole", shards, *settings) == [0, 0]
    assert train(tmp_path / "halves", shards, *settings) == [0, 0]
    last = tmp_path / "halves" / "step-00000009"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    assert train(tmp_path / "halves", shards, *settings) == [0, 0]
    whole, halves = tensors(tmp_path / "whole" / "step-00000009"), tensors(last)
    assert {name for name in whole if not torch.equal(whole[name], halves[name])} == set()
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


def test_never_does_not_trip_over_the_files_of_the_other_rank(tmp_path, shards):
    for attempt in range(2):
        assert train(tmp_path / str(attempt), shards, *PLAIN, options=("--resume", "never")) == [0, 0]


def test_a_checkpoint_of_two_ranks_continues_on_one(tmp_path, shards):
    settings = (*PLAIN[:-1], "schedule.epochs=2")
    assert train(tmp_path / "run", shards, *settings) == [0, 0]
    step_5 = ("--resume", str(tmp_path / "run" / "step-00000005"))
    assert train(tmp_path / "one", shards, *settings, options=step_5, ranks=1) == [0]
    state = json.loads((tmp_path / "one" / "step-00000009" / "state.json").read_text())
    assert (state["world_size"], state["samples_seen"]) == (1, 9 * 16)


def test_carried_images_of_two_ranks_are_dropped_on_one(tmp_path, shards):
    settings = ("alignment.kind=delayed", "schedule.epochs=2")
    assert train(tmp_path / "run", shards, *settings) == [0, 0]
    step_5 = tmp_path / "run" / "step-00000005"
    assert len(list(step_5.glob("task-*-of-00002.safetensors"))) == 2
    assert train(tmp_path / "one", shards, *settings, options=("--resume", str(step_5)), ranks=1) == [0]
    assert [path.name for path in (tmp_path / "one" / "step-00000009").glob("task-*")] == [
        "task-00000-of-00001.safetensors"
    ]
