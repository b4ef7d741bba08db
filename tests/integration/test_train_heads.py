"""Other heads through the trainer: sampled, with statistics, in bf16; a run that was cut goes on bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "smoke" / "tiny.yaml")
HEADS = {
    "curricularface": "{kind: curricularface, logit_scale: 16.0, sample_rate: 0.5, statistics_momentum: 0.2}",
    "magface": "{kind: magface, logit_scale: 16.0, lower_norm: 1.0, upper_norm: 9.0, logit_precision: bf16}",
    "combined": "{kind: combined, m2: 0.3, m3: 0.1, logit_scale: 16.0, interclass_filter: 0.9, sample_rate: 0.3}",
}

pytestmark = pytest.mark.slow


def train(run, shards, head, *options):
    overrides = [f"data.shards={shards}", f"head={HEADS[head]}", "schedule.epochs=2"]
    return main(["train", CONFIG, *overrides, "--run", str(run), *options])


def tensors(directory):
    return {
        f"{path.name}/{k}": v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("head", HEADS)
def test_2n_steps_are_n_steps_and_a_resume_bit_for_bit(tmp_path, drawn_shards, head):
    run, last = tmp_path / "run", tmp_path / "run" / "step-00000009"
    assert train(run, drawn_shards, head) == 0
    whole = tensors(last)
    shutil.rmtree(last)
    assert train(run, drawn_shards, head) == 0
    halves = tensors(last)
    assert whole.keys() == halves.keys()
    assert {name for name in whole if not torch.equal(whole[name], halves[name])} == set()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 9
    assert all(loss > 0 for loss in losses)
    if head == "curricularface":
        assert whole["head-00000-of-00001.safetensors/t"] != 0


def test_a_checkpoint_of_another_head_is_refused(tmp_path, drawn_shards, capsys):
    assert train(tmp_path / "one", drawn_shards, "magface") == 0
    options = ("--resume", str(tmp_path / "one"))
    assert train(tmp_path / "other", drawn_shards, "curricularface", *options) == 2
    assert "curricularface" in capsys.readouterr().err
