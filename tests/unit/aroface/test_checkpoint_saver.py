"""Snapshots on their way to disk: what is kept, what a failure leaves, and that old checkpoints stay readable."""

import errno
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aroface.config.engine import CheckpointConfig
from aroface.engine import saver as saver_module
from aroface.engine.best import BEST_FILE, Best, read_best, write_best
from aroface.engine.checkpoint import Snapshot, TensorFile
from aroface.engine.checkpoint_layout import (
    list_checkpoints,
    newest_valid,
    prune,
    resolve_checkpoint,
    start_checkpoint,
    torn_saves,
    verify_checkpoint,
)
from aroface.engine.saver import CheckpointSaver, write_snapshot
from aroface.errors import CheckpointError
from aroface.inference import load_model
from tests.helpers.checkpoints import tiny_backbone, tiny_config, write_checkpoint


def snapshot(step: int, *, rank: int = 0, ranks: int = 1, best: Best | None = None) -> Snapshot:
    files = {f"head-{rank:05d}-of-{ranks:05d}.safetensors": TensorFile({"weight": torch.full((4, 2), step + rank)}, {})}
    state = None
    if rank == 0:
        files["backbone.safetensors"] = TensorFile({"w": torch.full((8,), float(step))}, {"format": "pt"})
        state = {"step": step, "best": best.record() if best else None}
    return Snapshot(step, rank, ranks, files, state, best)


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run)]


@pytest.mark.parametrize("background", [True, False])
def test_a_save_is_whole_and_leaves_nothing_else(tmp_path, background):
    saver = CheckpointSaver(tmp_path, CheckpointConfig(background=background), rank=0)
    saver.start(snapshot(5))
    saver.settle()
    directory = tmp_path / "step-00000005"
    verify_checkpoint(directory)
    names = {"COMPLETE", "backbone.safetensors", "head-00000-of-00001.safetensors", "model.safetensors", "state.json"}
    assert {path.name for path in directory.iterdir()} == names
    assert (directory / "model.safetensors").samefile(directory / "backbone.safetensors")
    assert torn_saves(tmp_path) == []


def test_training_goes_on_while_the_disk_is_slow_and_the_next_save_waits(tmp_path, monkeypatch):
    may_write = threading.Event()
    monkeypatch.setattr(saver_module, "save_file", _slowly(may_write))
    waits = []

    def on_wait() -> None:
        waits.append(1)
        may_write.set()

    saver = CheckpointSaver(tmp_path, CheckpointConfig(), rank=0, on_wait=on_wait)
    saver.start(snapshot(5))
    assert steps(tmp_path) == []  # it returned, though nothing is written
    saver.start(snapshot(6))
    assert steps(tmp_path)[0] == 5
    assert waits
    saver.settle()
    assert steps(tmp_path) == [5, 6]


def _slowly(may_write: threading.Event):
    original = saver_module.save_file

    def save(*args, **options):
        assert may_write.wait(60)
        original(*args, **options)

    return save


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    saver = CheckpointSaver(tmp_path, CheckpointConfig(), rank=0)
    saver.start(snapshot(5))
    saver.settle()

    def full(*args, **options):
        Path(args[1]).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver_module, "save_file", full)
    saver.start(snapshot(10))
    with pytest.raises(CheckpointError, match=r"step 10 .* No space left on device.*step-00000005 is as it was.*Free"):
        saver.settle()
    assert newest_valid(tmp_path) == tmp_path / "step-00000005"
    assert torn_saves(tmp_path) == []
    with pytest.raises(CheckpointError, match="failed"):
        saver.start(snapshot(15))


def test_a_disk_that_hangs_is_given_up(tmp_path, monkeypatch, caplog):
    may_write = threading.Event()
    monkeypatch.setattr(saver_module, "save_file", _slowly(may_write))
    monkeypatch.setattr(saver_module, "_LAST_WAIT_S", 0.1)
    saver = CheckpointSaver(tmp_path, CheckpointConfig(), rank=0, patience_s=0.2)
    saver.start(snapshot(5))
    writer = next(thread for thread in threading.enumerate() if thread.name == "checkpoint")
    try:
        with pytest.raises(CheckpointError, match=r"step 5 .* did not end within 0.2 s.*file system hangs.*Mend it"):
            saver.settle()
        saver.close(patience_s=0.1)
        assert "step 5 is given up: its disk hangs" in caplog.text
        assert writer.is_alive()
        assert writer.daemon, "the process can end nevertheless"
    finally:
        may_write.set()
        writer.join(60)


def test_ranks_meet_in_the_directory(tmp_path):
    start_checkpoint(tmp_path, 7)
    first = threading.Thread(target=write_snapshot, args=(snapshot(7, ranks=3), tmp_path, CheckpointConfig()))
    first.start()
    for rank in (2, 1):
        assert steps(tmp_path) == []
        write_snapshot(snapshot(7, rank=rank, ranks=3), tmp_path, CheckpointConfig())
    first.join(60)
    directory = tmp_path / "step-00000007"
    verify_checkpoint(directory)
    assert not list(directory.glob("receipt*"))
    listed = json.loads((directory / "COMPLETE").read_text())["files"]
    assert {path.name for path in directory.iterdir()} == listed.keys() | {"COMPLETE"}
    assert [float(load_file(directory / f"head-0000{r}-of-00003.safetensors")["weight"][0, 0]) for r in range(3)] == [
        7,
        8,
        9,
    ]


def test_a_save_whose_other_rank_is_gone_is_given_up(tmp_path, caplog):
    saver = CheckpointSaver(tmp_path, CheckpointConfig(), rank=0)
    saver.start(snapshot(7, ranks=2))
    started = time.monotonic()
    saver.close(patience_s=0.2)
    assert time.monotonic() - started < 60
    assert "step 7 was given up: rank 1 did not write" in caplog.text
    assert newest_valid(tmp_path) is None
    assert [path.name for path in torn_saves(tmp_path)] == [".step-00000007.tmp"]


def test_torn_saves_are_named(tmp_path, caplog):
    write_checkpoint(tmp_path, step=3)
    start_checkpoint(tmp_path, 9)
    assert newest_valid(tmp_path) == tmp_path / "step-00000003"
    assert ".step-00000009.tmp: a save that was cut short" in caplog.text


def test_last_ones_every_nth_and_the_best_are_kept(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_every=20)
    best = None
    for step in range(5, 55, 5):
        if step == 15:
            best = Best(step, "lfw", "accuracy", 0.9)
        start_checkpoint(tmp_path, step)
        write_snapshot(snapshot(step, best=best), tmp_path, config)
    assert steps(tmp_path) == [15, 20, 40, 45, 50]
    assert resolve_checkpoint(tmp_path / BEST_FILE).name == "step-00000015"
    record = json.loads((tmp_path / BEST_FILE).read_text())
    assert record["checkpoint"] == "step-00000015"
    assert "Selected on lfw" in record["note"]
    doomed = prune(tmp_path, keep_last=1, best=best, is_dry=True)
    assert [path.name for path in doomed] == ["step-00000020", "step-00000040", "step-00000045"]
    assert steps(tmp_path) == [15, 20, 40, 45, 50]


def test_the_best_that_was_pruned_by_hand_is_missed(tmp_path):
    write_best(tmp_path, Best(4, "lfw", "accuracy", 0.5))
    assert read_best(tmp_path) == Best(4, "lfw", "accuracy", 0.5)
    with pytest.raises(CheckpointError, match="names step-00000004, which is gone"):
        resolve_checkpoint(tmp_path / BEST_FILE)
    write_best(tmp_path, None)
    assert read_best(tmp_path) is None


def test_model_safetensors_is_a_model_by_itself(tmp_path):
    from safetensors.torch import save_file

    from aroface.engine.checkpoint import RunPosition, _inference_metadata

    config = tiny_config()
    backbone = tiny_backbone(config)
    path = tmp_path / "model.safetensors"
    save_file(backbone.state_dict(), path, metadata=_inference_metadata(RunPosition(1, 8), config))
    model = load_model(path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model.backbone(images), backbone(images))
    assert model.contract.colour_order == config.data.colour_order
    plain = tmp_path / "plain.safetensors"
    save_file(backbone.state_dict(), plain)
    with pytest.raises(CheckpointError, match="its metadata lacks 'model'. Take the model.safetensors"):
        load_model(plain)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="is no model by itself"):
        load_model(path)


def test_checkpoints_of_the_first_layout_are_still_read(tmp_path):
    """Without model.safetensors, without metadata in the backbone's file."""
    directory = write_checkpoint(tmp_path)
    assert not (directory / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert load_model(directory).name.startswith("iresnet18")
