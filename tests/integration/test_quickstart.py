"""The quick start: its whole chain on a handful of faces, and its answers to bad input."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from aroface.images import encode_jpeg
from launch.cli import main
from launch.cmd_quickstart import _own_config, _split_identities
from shards.manifest import read_identities
from tests.helpers.face_folders import write_faces

TINY = [
    *("model.width=0.125", "model.image_size=32", "model.embedding_dim=16", "schedule.epochs=1"),
    *("schedule.warmup_epochs=0", "batch.global_batch=8", "engine.threads=1"),
]


@pytest.mark.slow
def test_whole_chain_on_a_few_drawn_faces(tmp_path, drawn_faces, capsys):
    """Split, pack, train, export, embed, gallery, search, identify, LFW-LQ, FAE, attack, report."""
    out = tmp_path / "out"
    assert main(["quickstart", "--data", str(drawn_faces), "--out", str(out), *TINY]) == 0
    printed = capsys.readouterr().out
    for command in ("pack", "train", "export", "embed", "gallery build", "gallery search", "report"):
        assert f"$ aroface {command}" in printed
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert all(stage["seconds"] > 0 for stage in stages)
    result = json.loads((out / "results" / "identification.json").read_text())
    assert 0 <= result["metrics"]["rank_1"]["value"] <= 1
    page = (out / "report" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:image' in page or "<svg" in page
    assert (out / "report" / "report.md").stat().st_size > 1000
    train, test = (set((out / f"{part}-identities.txt").read_text().split()) for part in ("train", "test"))
    assert train.isdisjoint(test)
    assert len(train | test) == 12


@pytest.mark.parametrize("synthetic", [True, False])
def test_own_configuration_exists(synthetic):
    assert _own_config(synthetic=synthetic).is_file()


def refused(capsys, *arguments):
    assert main(["quickstart", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_missing_and_empty_folders(tmp_path, capsys):
    assert "does not exist" in refused(capsys, "--data", tmp_path / "nowhere", "--out", tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(capsys, "--data", tmp_path / "empty", "--out", tmp_path / "b")


def test_zip_without_images(tmp_path, capsys):
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no faces here")
    assert "holds no images" in refused(capsys, "--data", path, "--out", tmp_path / "out")


def test_existing_output_folder_is_never_overwritten(tmp_path, drawn_faces, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    assert "exists already and is not empty" in refused(capsys, "--data", drawn_faces, "--out", out)
    assert (out / "precious.txt").read_text() == "keep me"


def test_names_that_are_no_unicode_are_split_and_packed(tmp_path):
    faces = write_faces(tmp_path / "faces", {os.fsdecode(b"\xff%d" % i): 1 for i in range(4)})
    lists = _split_identities(faces, tmp_path)
    for path in lists:
        out = tmp_path / path.stem
        assert main(["pack", str(faces), str(out), "--identities", str(path), "--workers", "1"]) == 0
        assert [os.fsencode(one.name) for one in read_identities(out)] == path.read_bytes().split()
    assert sum(len(path.read_bytes().split()) for path in lists) == 4


def test_too_few_identities_to_split(tmp_path, capsys):
    faces = write_faces(tmp_path / "faces", {"a": 2, "b": 2})
    assert "at least 3 are needed" in refused(capsys, "--data", faces, "--out", tmp_path / "out")


def test_identities_with_one_image_cannot_be_tested_on(tmp_path, capfd):
    train = write_faces(tmp_path / "train", dict.fromkeys("abcd", 2))
    test = write_faces(tmp_path / "test", dict.fromkeys("wxyz", 1))
    message = refused(capfd, "--data", train, "--test", test, "--out", tmp_path / "out", *TINY)
    assert "no identity of the test set" in message.lower()


def test_unreadable_image_among_good_ones_is_named(tmp_path, capfd):
    faces = write_faces(tmp_path / "faces", dict.fromkeys("abcdef", 4))
    test = write_faces(tmp_path / "test", dict.fromkeys("xyz", 2))
    whole = encode_jpeg(np.full((16, 16, 3), 90, np.uint8))
    (faces / "a" / "000.jpg").write_bytes(whole[: len(whole) // 3])
    message = refused(capfd, "--data", faces, "--test", test, "--out", tmp_path / "out")
    assert "a/000.jpg" in message
    assert "--max-bad" in message


def test_test_set_without_data(tmp_path, drawn_faces, capsys):
    assert "--test needs --data" in refused(capsys, "--test", drawn_faces, "--out", tmp_path / "out")


def test_misspelt_setting_stops_before_any_work(tmp_path, drawn_faces, capsys):
    message = refused(capsys, "--data", drawn_faces, "--out", tmp_path / "out", "head.marginn=0.5")
    assert "did you mean head.margin" in message
    assert not Path(tmp_path / "out" / "shards").exists()
