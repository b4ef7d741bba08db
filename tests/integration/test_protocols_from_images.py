"""`evaluate PROTOCOL --model M --images DIR` gives what the embeddings of the same images give."""

from pathlib import Path

import numpy as np
import pytest

from aroface.align import align_face
from retrieval.baselines import PixelEmbedder
from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet
from retrieval.protocols.ijb import read_ijb_samples
from shards.faces import ImageFolder
from tests.helpers.protocol_sets import (
    SAMPLES,
    TEMPLATES,
    write_covariates,
    write_ijb,
    write_ijbs,
    write_manifest,
    write_survface,
    write_tinyface,
)
from tests.integration.test_fae_sets import write_images
from tests.integration.test_protocol_commands import evaluate

#: Protocol and task.
PROTOCOLS = ("tinyface", "ijbb", "ijbb 1:N", "ijbc covariates", "ijbs", "survface", "scface", "templates", "calfw")


def write_set(name: str, folder: Path) -> tuple[list[str], list[int], list[object]]:
    """Files of one protocol: keys of the images, people, options."""
    if name == "tinyface":
        return *write_tinyface(folder), ["--lists", folder]
    if name.startswith("ijbb"):
        return *write_ijb(folder, name="ijbb"), ["--meta", folder, "--task", name.partition(" ")[2] or "1:1"]
    if name == "ijbc covariates":
        return *write_covariates(folder)[:2], ["--meta", folder, "--task", "covariates"]
    if name == "ijbs":
        return *write_ijbs(folder), ["--protocol", folder, "--task", "surveillance_to_booking"]
    if name == "survface":
        return *write_survface(folder), ["--root", folder]
    if name == "scface":
        keys = [f"{s:03d}_{part}.jpg" for s in range(1, 6) for part in ("frontal", "cam1_1", "cam2_2", "cam3_3")]
        return keys, [int(key[:3]) for key in keys], []
    if name == "templates":
        keys = [line.split(",")[2] for line in SAMPLES]
        write_manifest(folder, TEMPLATES, SAMPLES)
        return keys, [int(key[0]) for key in keys], ["--manifest", folder]
    keys = [f"p{p}/p{p}_000{i}.jpg" for p in range(30) for i in (1, 2)]
    lines = [f"p{p}\t1\t2\np{p}\t1\tp{(p + 1) % 30}\t2" for p in range(30)]
    folder.mkdir()
    (folder / "pairs.txt").write_text("10\t3\n" + "\n".join(lines))
    return keys, [row // 2 for row in range(60)], ["--pairs", folder / "pairs.txt"]


def embed(images: Path, landmarks: dict[str, np.ndarray], *, flip: bool) -> EmbeddingSet:
    """Each image for itself, in a plain loop."""
    faces, model, rows = ImageFolder(images), PixelEmbedder(), []
    for place, key in enumerate(faces.keys):
        pixels = faces.read(place)
        if key in landmarks:
            pixels = align_face(pixels, landmarks[key])
        row = model.embed(pixels[None])[0]
        rows.append(row + model.embed(pixels[None, :, ::-1])[0] if flip else row)
    return EmbeddingSet(np.array(rows), np.zeros(len(rows), int), keys=np.array(faces.keys))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_model_and_images_give_what_their_embeddings_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("launch.embedders.open_embedder", lambda *_, **__: PixelEmbedder())
    keys, people, options = write_set(name, tmp_path / "lists")
    write_images(tmp_path / "images", keys, people)
    landmarks: dict[str, np.ndarray] = {}
    if name.startswith("ijbb"):
        samples = read_ijb_samples(tmp_path / "lists", "ijbb")
        assert samples.landmarks is not None
        landmarks = dict(zip(samples.keys.tolist(), samples.landmarks, strict=True))
    write_embeddings(tmp_path / "e.npz", embed(tmp_path / "images", landmarks, flip=name != "ijbs"))
    sources = {
        "model": ["--model", "m", "--images", tmp_path / "images"],
        "embeddings": ["--embeddings", tmp_path / "e.npz"],
    }
    records, details = {}, {}
    for source, more in sources.items():
        path = tmp_path / f"{source}.npz"
        command = [*options, *more, "--details", path, "--resamples", 0]
        records[source] = evaluate(tmp_path, name.split()[0], *command)
        details[source] = dict(np.load(path, allow_pickle=False))
    assert records["model"]["counts"] == records["embeddings"]["counts"]
    assert details["model"].keys() == details["embeddings"].keys()
    for key, values in details["embeddings"].items():
        if key == "preprocessing":  # an embedding file without metadata does not tell it
            continue
        if values.dtype.kind == "f":
            np.testing.assert_allclose(details["model"][key], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(details["model"][key], values)
    for key, entry in records["embeddings"]["metrics"].items():
        assert records["model"]["metrics"][key]["value"] == pytest.approx(entry["value"], abs=1e-5)
    assert records["model"]["inputs"]["model"]["model_id"] == PixelEmbedder.model_id


@pytest.mark.parametrize("flip", ["none", "sum"])
def test_both_variants_of_tinyface_by_euclidean_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: str
) -> None:
    monkeypatch.setattr("launch.embedders.open_embedder", lambda *_, **__: PixelEmbedder())
    keys, people = write_tinyface(tmp_path / "lists")
    shown = [row % 6 + 10 if row % 5 == 0 else person for row, person in enumerate(people)]  # some show somebody else
    write_images(tmp_path / "Testing_Set", keys, shown)
    source = ["--lists", tmp_path / "lists", "--model", "m", "--images", tmp_path / "Testing_Set", "--flip", flip]
    record = evaluate(tmp_path, "tinyface", *source, "--resamples", 0)
    found = embed(tmp_path / "Testing_Set", {}, flip=flip == "sum")
    assert found.keys is not None
    rows = dict(zip(found.keys.tolist(), found.unit().astype(float), strict=True))
    ranks, precisions = [], []
    for key, person in zip(keys[:12], people[:12], strict=True):
        distances = [np.linalg.norm(rows[key] - rows[other]) for other in keys[12:]]
        is_mate = [people[12:][place] == person for place in np.argsort(distances)]
        ranks.append(1 + is_mate.index(True))
        hits, area, before = 0, 0.0, 1.0
        for place, mate in enumerate(is_mate, 1):
            hits += mate
            if mate:
                area += (before + hits / place) / 2 / sum(is_mate)
            before = hits / place
        precisions.append(area)
    assert len(set(ranks)) > 1
    for rank in (1, 5, 10, 20):
        assert record["metrics"][f"rank_{rank}"]["value"] == pytest.approx(np.mean(np.array(ranks) <= rank))
    assert record["metrics"]["map"]["value"] == pytest.approx(np.mean(precisions))
    assert record["preprocessing"]["flip"] == flip
