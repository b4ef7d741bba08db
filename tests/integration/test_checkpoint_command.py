"""`aroface checkpoint`, and what a damaged or foreign checkpoint leads to."""

import json
import shutil

import numpy as np
import pytest

from aroface.engine.best import Best, write_best
from aroface.engine.checkpoint_layout import newest_valid
from launch.cli import main
from tests.helpers.training import BATCH, COMPARABLE, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    train(run, *COMPARABLE, "checkpoint.every_steps=2")
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    return data


def rows(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_info_tells_what_is_there(run, capsys):
    write_best(run, Best(4, "lfw", "accuracy", 0.75))
    (run / "step-00000002" / "COMPLETE").unlink()
    (run / ".step-00000008.tmp").mkdir()
    assert main(["checkpoint", "info", str(run), "--json"]) == 0
    found = {row["checkpoint"]: row for row in rows(capsys)}
    assert found["step-00000006"]["samples_seen"] == 6 * BATCH
    assert found["step-00000006"]["state"] == "whole"
    assert found["step-00000004"]["state"] == "whole, best by accuracy on lfw"
    assert found["step-00000002"]["state"] == found[".step-00000008.tmp"]["state"] == "torn: never read"
    assert main(["checkpoint", "info", str(run / "step-00000006")]) == 0
    assert "step-00000006" in capsys.readouterr().out


def test_the_model_file_of_a_trained_run_embeds_by_itself(run, drawn_faces, tmp_path):
    alone = tmp_path / "moved" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(run / "step-00000006" / "model.safetensors", alone)
    found = []
    for model in (run / "step-00000006", run / "step-00000006" / "model.safetensors", alone):
        out = tmp_path / f"{len(found)}.npz"
        assert main(["embed", str(model), str(drawn_faces), "--out", str(out), "--threads", "1"]) == 0
        with np.load(out, allow_pickle=False) as file:
            found.append(file["embeddings"])
    assert found[0].shape == (72, 8)
    assert np.linalg.norm(found[0], axis=1).min() > 0
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_verify_names_what_is_damaged(run, capsys):
    (run / ".step-00000008.tmp").mkdir()
    assert main(["checkpoint", "verify", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": whole") == 3
    assert ".step-00000008.tmp: no checkpoint: a save that is under way or was cut short" in printed
    path = run / "step-00000004" / "optimizer.safetensors"
    data = flip_a_bit(path)
    assert main(["checkpoint", "verify", str(run)]) == 2
    captured = capsys.readouterr()
    assert "optimizer.safetensors does not have the checksum it was saved with" in captured.err
    assert captured.out.count("DAMAGED") == 1
    path.write_bytes(data[:-100])
    assert main(["checkpoint", "verify", str(run / "step-00000004")]) == 2


def test_prune_says_then_does(run, capsys):
    write_best(run, Best(2, "lfw", "accuracy", 0.75))
    keep = ["checkpoint", "prune", str(run), "--keep-last", "1"]
    assert main([*keep, "--dry-run"]) == 0
    assert "would delete" in capsys.readouterr().out
    assert (run / "step-00000004").exists()
    assert main(keep) == 0
    assert "2 stay, the best (accuracy on lfw) among them" in capsys.readouterr().out
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000002", "step-00000006"]


def test_prune_does_not_count_a_damaged_checkpoint_as_kept(run, capsys):
    flip_a_bit(run / "step-00000006" / "optimizer.safetensors")
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert "step-00000006: DAMAGED, stays, and is not counted" in capsys.readouterr().out
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000004", "step-00000006"]
    assert newest_valid(run) == run / "step-00000004"
    flip_a_bit(run / "step-00000004" / "backbone.safetensors")
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert len(list(run.glob("step-*"))) == 2, "nothing good is left, so nothing is deleted"


@pytest.mark.parametrize("action", ["info", "verify", "prune"])
def test_nothing_there_is_said(tmp_path, capsys, action):
    options = ["--keep-last", "1"] if action == "prune" else []
    assert main(["checkpoint", action, str(tmp_path), *options]) == 2
    assert "holds no checkpoints; give a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, caplog, damage):
    path = run / "step-00000006" / "head-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    again = train(run, *COMPARABLE, "checkpoint.every_steps=2")
    assert "step-00000006/head-00000-of-00001.safetensors does not have the checksum" in caplog.text
    assert len(again.delivered) == 2  # steps 5 and 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("head={kind: adaface, margin: 0.3, logit_scale: 16.0}", "trained with head.kind = arcface, not adaface"),
        ("model.width=0.25", "backbone.safetensors is of another network"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(run, tmp_path, settings, message):
    from aroface.errors import CheckpointError

    with pytest.raises(CheckpointError, match=message):
        train(tmp_path / "other", *COMPARABLE, settings, resume=run)


def test_a_checkpoint_of_another_class_count_or_data_is_refused(run, tmp_path, monkeypatch):
    from aroface.errors import CheckpointError
    from tests.helpers.training import DrawnData

    monkeypatch.setattr(DrawnData, "fingerprint", "other")
    with pytest.raises(CheckpointError, match=r"trained on other shards.*Resume with those"):
        train(tmp_path / "other", *COMPARABLE, resume=run)
    monkeypatch.setattr(DrawnData, "num_classes", 13)
    with pytest.raises(CheckpointError, match="has 12 classes, the training set 13"):
        train(tmp_path / "third", *COMPARABLE, resume=run)


def test_a_run_of_before_the_newer_settings_goes_on(run):
    """Settings that did not exist yet have the defaults that the run had."""
    path = run / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.strip().startswith(("clip_scope", "evaluate", "keep_every"))]
    assert len(older) == len(lines) - 3
    path.write_text("".join(older))
    shutil.rmtree(run / "step-00000006")
    assert len(train(run, *COMPARABLE, "checkpoint.every_steps=2").delivered) == 2
