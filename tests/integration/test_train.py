"""The trainer from the command line's side: it learns, resumes bit for bit, stops when told, and refuses nonsense."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aroface.engine.deepspeed_engine import BackboneEngine
from launch.cli import main
from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic

CONFIG = str(Path(__file__).parents[2] / "configs" / "smoke" / "tiny.yaml")


def train(run, shards, *overrides, options=()):
    return main(["train", CONFIG, f"data.shards={shards}", *overrides, "--run", str(run), *options])


def tensors(directory):
    return {
        f"{path.name}/{k}": v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        (0, "alignment.kind=adversarial"),
        (1, "alignment.kind=adversarial"),
        (1, "alignment.kind=delayed"),
        (1, "alignment.kind=best_of"),
        (1, "model.dropout=0.4"),
    ],
)
def test_2n_steps_are_n_steps_and_a_resume_bit_for_bit(tmp_path, drawn_shards, stage, setting):
    """Weights, momentum, norm statistics and losses, with attack, augmentation and accumulation on."""
    # 9 steps of 16 images
    settings = [f"engine.zero_stage={stage}", "schedule.epochs=2", setting]
    assert train(tmp_path / "whole", drawn_shards, *settings) == 0
    assert train(tmp_path / "halves", drawn_shards, *settings) == 0
    last = tmp_path / "halves" / "step-00000009"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    assert train(tmp_path / "halves", drawn_shards, *settings) == 0
    whole, halves = tensors(tmp_path / "whole" / "step-00000009"), tensors(last)
    assert whole.keys() == halves.keys()
    assert {name for name in whole if not torch.equal(whole[name], halves[name])} == set()
    fixed = ("step", "samples", "loss", "lr", "grad_norm")
    rows = [[{key: line[key] for key in fixed} for line in metrics(tmp_path / run)] for run in ("whole", "halves")]
    assert rows[0] == rows[1]
    assert [line["step"] for line in rows[0]] == list(range(1, 10))


@pytest.mark.parametrize(
    "settings",
    [
        ("alignment.kind=elastic", "alignment.consistency_weight=0.5"),
        ("alignment.kind=delayed", "alignment.consistency_weight=0.5"),
        ("alignment.release_compat=true",),
        ("alignment.batch_statistics=running", "alignment.steps=2", "alignment.landmark_budget_px=6.0"),
    ],
)
def test_every_way_of_alignment_trains(tmp_path, drawn_shards, settings):
    assert train(tmp_path / "run", drawn_shards, "schedule.epochs=0.8", *settings) == 0
    assert len(metrics(tmp_path / "run")) == 4


def test_training_lowers_the_loss(tmp_path, drawn_shards):
    assert train(tmp_path / "run", drawn_shards, "schedule.epochs=6", "alignment.kind=none", "head.margin=0.0") == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_engine_equals_plain_pytorch(tmp_path, drawn_shards):
    """DeepSpeed with ZeRO 1 and our head against a loop of torch.optim.SGD in fp32."""
    from aroface.config import TrainConfig, load_config
    from aroface.engine.schedule import learning_rate
    from aroface.engine.seeding import derive_seed
    from aroface.engine.task import contract_of
    from aroface.heads import build_head
    from aroface.models import build_backbone
    from aroface.preprocess import normalise
    from shards.dataset import ShardDataset

    settings = [
        *("engine.precision=fp32", "alignment.kind=none", "data.augment.flip=0", "data.augment.low_resolution=0"),
        *("data.augment.photometric=0", "data.augment.crop=0", "data.augment.erase=0", "data.augment.grey=0"),
        *("head.kind=arcface", "batch.micro_batch=16", "schedule.epochs=1", "optim.clip_norm=0.5"),
    ]
    path = tmp_path / "plain.yaml"
    text = Path(CONFIG).read_text().replace("  h: 0.333\n  statistics_momentum: 0.1\n", "")
    path.write_text(text)
    assert main(["train", str(path), f"data.shards={drawn_shards}", *settings, "--run", str(tmp_path / "run")]) == 0
    config = load_config(path, TrainConfig, [f"data.shards={drawn_shards}", *settings])
    data = ShardDataset(drawn_shards, image_size=32)
    torch.manual_seed(derive_seed(config.seed, "backbone weights"))
    backbone = build_backbone(config.model)
    head = build_head(config.head, num_classes=data.num_classes, embedding_dim=16, seed=config.seed)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(p, lr=0.0, momentum=0.9, weight_decay=5e-4) for p in (trained, [head.weight])]
    stream = data.batches(seed=0, start_position=0, num_batches=5, batch_size=16, rank=0, world_size=1)
    losses = []
    for step, batch in enumerate(stream):
        loss = head(backbone(normalise(batch.images, contract_of(config))), batch.labels, step=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, num_samples=data.num_samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)
    saved = tensors(tmp_path / "run" / "step-00000005")
    for name, value in backbone.state_dict().items():
        # fp32 rounding, amplified by five steps of a rate of 0.05
        torch.testing.assert_close(saved[f"backbone.safetensors/{name}"], value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        saved["head-00000-of-00001.safetensors/weight"], head.weight.detach(), rtol=1e-3, atol=1e-5
    )


def test_sigterm_finishes_the_step_saves_and_exits_with_0_however_often_it_comes(tmp_path, drawn_shards):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", CONFIG, f"data.shards={drawn_shards}", "schedule.epochs=2000"]
    process = subprocess.Popen(
        [*command, "checkpoint.every_steps=100000", "--run", str(run)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    assert b"stopped at step" in out
    state = json.loads(next(run.glob("step-*/state.json")).read_text())
    assert state["step"] == len(metrics(run))
    assert state["samples_seen"] == 16 * state["step"]


def test_check_makes_the_first_step_and_keeps_nothing(tmp_path, drawn_shards, capsys, monkeypatch):
    passes, backward = [], BackboneEngine.backward
    monkeypatch.setattr(BackboneEngine, "backward", lambda *args: passes.append(1) or backward(*args))
    assert train(tmp_path / "run", drawn_shards, options=["--check"]) == 0
    printed = capsys.readouterr().out
    assert len(passes) == 2  # micro-batches
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", drawn_shards) == 0
    assert f"check passed: loss of an untrained batch {metrics(tmp_path / 'run')[0]['loss']:.3f}" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.marginn=0.5"], "head.marginn is not a setting; did you mean head.margin?"),
        (["head.margin=3"], "head.margin = 3: input should be less than or equal to 1.57"),
        (["alignment.kind=delayed", "alignment.share=0.6"], "at most 0.5 can be warped; lower share"),
        (["alignment.release_compat=true", "alignment.share=0.3"], "makes 5 + 2 of 8 images"),
        (["alignment.share=0.01"], "of 8 images per rank and micro-batch is no image; raise alignment.share"),
        (["alignment.share=0.1"], "is one image, which has no batch statistics; raise alignment.share"),
        (["data.shards=nowhere"], "nowhere is not a finished shard directory"),
        (["batch.micro_batch=5"], "batch.micro_batch 5 x accumulation 3.2 x 1 ranks = batch.global_batch 16"),
        (["data.min_images_per_identity=100"], "leaves nothing"),
        (["engine.deepspeed_extra={gradient_cliping: 1}"], "gradient_cliping is not passed to DeepSpeed"),
        (["engine.deepspeed_extra={zero_optimization: 1}"], "zero_optimization = 1 is not a group of settings"),
    ],
)
def test_bad_settings_are_named(tmp_path, drawn_shards, capsys, overrides, message):
    assert train(tmp_path / "run", drawn_shards, *overrides) == 2
    assert message in capsys.readouterr().err


def test_resume_with_nothing_to_resume(tmp_path, drawn_shards, capsys):
    assert train(tmp_path / "run", drawn_shards, options=["--resume", str(tmp_path / "nowhere")]) == 2
    assert "does not exist; give a run directory" in capsys.readouterr().err


def test_run_directory_of_another_configuration_is_refused(tmp_path, drawn_shards, capsys):
    assert train(tmp_path / "run", drawn_shards, "schedule.epochs=0.5", "schedule.warmup_epochs=0") == 0
    assert train(tmp_path / "run", drawn_shards, "schedule.epochs=0.5", "schedule.warmup_epochs=0", "seed=1") == 2
    assert "another configuration (seed: 0 -> 1)" in capsys.readouterr().err
    assert train(tmp_path / "run", drawn_shards, options=["--resume", "never"]) == 2
    assert "is not empty and --resume never starts afresh" in capsys.readouterr().err


def test_non_finite_loss_stops_before_the_update_and_names_the_batch(tmp_path, drawn_shards, capsys):
    settings = ["optim.lr_per_1024=1e30", "optim.clip_norm=null", "engine.precision=fp32", "schedule.warmup_epochs=0"]
    assert train(tmp_path / "run", drawn_shards, *settings) == 2
    message = capsys.readouterr().err
    assert "is not finite" in message
    assert "shard-000000.tar: id_" in message
    for directory in (tmp_path / "run").glob("step-*"):
        assert all(torch.isfinite(value).all() for value in load_file(directory / "backbone.safetensors").values())


@pytest.mark.parametrize(
    ("identities", "batch", "told"),
    [
        (1, 8, ["data.shards has one identity: .* Name shards of two identities at least"]),
        (2, 12, [r"batch\.global_batch = 12 is more than the 8 images .* a step is 1\.5 epochs.* Set it to 8 at most"]),
        (2, 8, []),
    ],
)
def test_a_training_to_no_purpose_is_a_warning(tmp_path, caplog, identities, batch, told):
    write_synthetic(tmp_path / "faces", identities=identities, images_per_identity=8 // identities, seed=0)
    pack(tmp_path / "faces", tmp_path / "shards", PackOptions())
    settings = (f"batch={{global_batch: {batch}}}", "schedule.warmup_epochs=0")
    assert train(tmp_path / "run", tmp_path / "shards", *settings, options=["--check"]) == 0
    warnings = [record.getMessage() for record in caplog.records if record.name == "launch.cmd_train"]
    assert len(warnings) == len(told)
    assert all(re.search(pattern, text) for pattern, text in zip(told, warnings, strict=True))


def test_the_run_directory_says_what_ran(tmp_path, drawn_shards):
    short = ["schedule.epochs=0.5", "schedule.warmup_epochs=0"]
    assert train(tmp_path / "run", drawn_shards, *short) == 0
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["overrides"][1:] == short
    assert "deepspeed" in environment["versions"]


def test_resume_from_a_path_keeps_one_course_in_a_directory(tmp_path, drawn_shards, capsys):
    run = tmp_path / "run"
    assert train(run, drawn_shards) == 0
    step_5 = ["--resume", str(run / "step-00000005")]
    assert train(run, drawn_shards, options=step_5) == 2
    assert "already holds step-00000009, later than step-00000005" in capsys.readouterr().err
    assert train(run, drawn_shards, "seed=1", options=step_5) == 2
    assert "another configuration (seed: 0 -> 1)" in capsys.readouterr().err
    assert train(run, drawn_shards, "engine.precision=fp16") == 2
    assert re.search(r"engine\.precision: '(bf16|fp32)' -> 'fp16'", capsys.readouterr().err)
    before = tensors(run / "step-00000009")
    assert train(tmp_path / "branch", drawn_shards, options=step_5) == 0
    after = tensors(tmp_path / "branch" / "step-00000009")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(tmp_path / "wide", drawn_shards, "model.width=0.25", options=step_5) == 2
    assert "backbone.safetensors is of another network" in capsys.readouterr().err
