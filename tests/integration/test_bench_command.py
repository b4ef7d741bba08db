import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.bench.peers import arcface_batches, webdataset_batches
from launch.bench.records import RecordWriter
from launch.cli import main
from shards.pack import PackOptions, pack
from tests.helpers.face_folders import write_faces


def test_the_loader_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = write_faces(tmp_path / "faces", {"ada": 5, "bob": 4})
    out = tmp_path / "loader.json"
    sizes = ["--images", "40", "--batch-size", "8", "--memory-images", "80", "--open-images", "9000"]
    assert main(["bench", "loader", "--data", str(faces), *sizes, "--rounds", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert record["reading"]["aroface"]["items"] == record["reading"]["webdataset"]["items"] == 40
    assert record["packing"]["pack"]["items"] == record["packing"]["copy, headers with Pillow"]["items"] == 40
    assert record["machine"]["cores"] >= 1
    for figure in record["figures"]:
        assert figure["name"] in printed
        assert np.isfinite(figure["value"])
        assert (figure["goal"] is None) == (figure["reached"] is None)


@pytest.mark.slow
def test_exports_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "export.json"
    sizes = ["--depths", "18", "--width", "0.125", "--batches", "1,2", "--images", "2", "--rounds", "1"]
    assert main(["bench", "export", *sizes, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["measurements"]) == {"R18, batch 1", "R18, batch 2"}
    cosines = {name: entry["min_cosine"] for name, entry in record["measurements"]["R18, batch 2"].items()}
    assert len(cosines) == 9
    assert min(cosines[name] for name in cosines if "fp32" in name) > 0.99999
    assert min(cosines[name] for name in cosines if "16" in name) > 0.995
    goals = {figure["name"] for figure in record["figures"] if figure["goal"] is not None}
    assert "R18, batch 1: onnxruntime fp32 / eager" in goals


def test_the_protocols_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "protocols.json"
    assert main(["bench", "protocols", "--scale", "0.01", "--resamples", "20", "--out", str(out)]) == 0
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert len(figures) == 12
    assert all(figure["value"] > 0 for figure in figures.values())


def test_the_peers_deliver_what_we_deliver(tmp_path: Path) -> None:
    from aroface.images import decode_rgb

    faces = write_faces(tmp_path / "faces", {"ada": 3, "bob": 2})
    files = [(path.read_bytes(), label) for label, who in enumerate(("ada", "bob")) for path in (faces / who).iterdir()]
    with RecordWriter(tmp_path / "records", classes=2) as writer:
        for image, label in files:
            writer.add(image, label)
    pack(tmp_path / "records", tmp_path / "shards", PackOptions())
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    truth = sorted((label, _mean(decode_rgb(image) / 127.5 - 1)) for image, label in files)
    peer = list(arcface_batches(tmp_path / "records", batch_size=1, workers=0))
    stream = [(2 * images - 1, labels) for images, labels in webdataset_batches(tars, batch_size=1, workers=0)]
    for found in (peer, stream):
        delivered = sorted((int(labels[0]), _mean(images[0])) for images, labels in found)
        assert np.array(delivered) == pytest.approx(np.array(truth), abs=2e-2)


def _mean(image: np.ndarray | torch.Tensor) -> float:
    return float(np.asarray(image).mean())
