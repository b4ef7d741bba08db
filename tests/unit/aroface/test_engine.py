"""Schedules, generated DeepSpeed settings, and the checkpoint layout."""

import json

import pytest

from aroface.config.schema import TrainConfig
from aroface.engine.checkpoint_layout import (
    finish_checkpoint,
    list_checkpoints,
    newest_valid,
    prune,
    resolve_checkpoint,
    start_checkpoint,
    verify_checkpoint,
    write_state,
)
from aroface.engine.deepspeed_settings import deepspeed_settings
from aroface.engine.schedule import accumulation_steps, learning_rate, total_steps
from aroface.engine.seeding import derive_seed
from aroface.errors import CheckpointError, ConfigError
from tests.helpers.checkpoints import tiny_config


def config(**sections):
    values = tiny_config().model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    return TrainConfig.model_validate(values)


def test_learning_rate_follows_the_global_batch_warms_up_and_ends_at_zero():
    run = config(batch={"global_batch": 512}, schedule={"epochs": 10.0, "warmup_epochs": 1.0, "power": 2.0})
    assert run.peak_lr == pytest.approx(0.05)
    samples = 5120
    assert total_steps(run, samples) == 100
    rates = [learning_rate(run, step, num_samples=samples) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == pytest.approx(run.peak_lr)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(run.peak_lr * 0.25)
    assert 0 < rates[99] < 1e-4


def test_steps_cover_whole_epochs():
    assert total_steps(config(batch={"global_batch": 8}, schedule={"epochs": 1.0}), 17) == 3


def test_accumulation_is_derived_and_a_misfit_names_all_four_numbers():
    run = config(batch={"global_batch": 96, "micro_batch": 8})
    assert accumulation_steps(run, 3) == 4
    with pytest.raises(ConfigError, match=r"micro_batch 8 x accumulation 2\.4 x 5 ranks = batch\.global_batch 96"):
        accumulation_steps(run, 5)


def test_deepspeed_settings_are_written_out():
    settings = deepspeed_settings(config(batch={"global_batch": 32, "micro_batch": 4}, engine={"precision": "bf16"}), 2)
    assert settings["train_batch_size"] == 32
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["zero_optimization"] == {"stage": 1, "compute_grad_norm": False}
    assert settings["torch_autocast"]["enabled"] is True
    json.dumps(settings)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"gradient_cliping": 5.0}, "gradient_cliping is not passed to DeepSpeed"),
        ({"activation_checkpoint": {}}, "did you mean activation_checkpointing"),
        ({"gradient_clipping": 5.0}, "is generated from the other settings"),
        ({"zero_optimization": {"stage": 2}}, "set by engine.zero_stage"),
    ],
)
def test_deepspeed_extra_is_checked_by_name(extra, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(config(engine={"deepspeed_extra": extra}), 1)


def test_seeds_differ_by_every_part():
    seeds = {
        derive_seed(seed, purpose, step=step, rank=rank)
        for seed in (0, 1)
        for purpose in ("a", "b")
        for step in (0, 1)
        for rank in (0, 1)
    }
    assert len(seeds) == 16


def make_checkpoint(run, step):
    temporary = start_checkpoint(run, step)
    (temporary / "backbone.safetensors").write_bytes(bytes(range(100)))
    write_state(temporary, {"step": step})
    return finish_checkpoint(temporary, run, step)


def test_whole_checkpoint_is_found(tmp_path):
    make_checkpoint(tmp_path, 5)
    newest = make_checkpoint(tmp_path, 10)
    assert resolve_checkpoint(tmp_path) == newest
    assert resolve_checkpoint(newest) == newest
    assert not list(tmp_path.glob(".step*"))


def test_flipped_byte_is_refused_and_the_older_checkpoint_taken(tmp_path, caplog):
    older = make_checkpoint(tmp_path, 5)
    newest = make_checkpoint(tmp_path, 10)
    data = bytearray((newest / "backbone.safetensors").read_bytes())
    data[50] ^= 1
    (newest / "backbone.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="backbone.safetensors does not have the checksum"):
        verify_checkpoint(newest)
    assert newest_valid(tmp_path) == older
    assert "Passing over a damaged checkpoint" in caplog.text


def test_torn_directories_are_never_taken(tmp_path):
    older = make_checkpoint(tmp_path, 5)
    torn = make_checkpoint(tmp_path, 10)
    (torn / "COMPLETE").unlink()
    start_checkpoint(tmp_path, 15)
    assert newest_valid(tmp_path) == older
    with pytest.raises(CheckpointError, match="no COMPLETE file"):
        verify_checkpoint(torn)
    truncated = make_checkpoint(tmp_path, 20)
    (truncated / "state.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="state.json does not have the checksum"):
        verify_checkpoint(truncated)


def test_missing_file_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, 5)
    (directory / "backbone.safetensors").unlink()
    with pytest.raises(CheckpointError, match="backbone.safetensors is missing"):
        resolve_checkpoint(tmp_path / "step-00000005")


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
