"""The hand-computed searches through the offline interface: embedding files in, the keys and numbers of JSON out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet
from tests.numerics.test_protocol_vectors import VECTORS

#: Scores are halved, so that unit vectors can have them with every entry; ranks and rates stay.
SCALE = np.float32(0.5)


def write_gallery(path: Path, people: list[str], first: int, dim: int) -> None:
    """One axis per entry, so that a probe's components are its scores."""
    write_embeddings(path, EmbeddingSet(np.eye(dim, dtype=np.float32)[first : first + len(people)], np.array(people)))


def write_probes(path: Path, people: list[str], scores: list[list[float] | None]) -> None:
    """Rows of length 1 up to 1e-15, so that equal scores stay equal; None fails to enrol."""
    width = len(next(row for row in scores if row is not None))
    rows = np.zeros((len(scores), width + 2), np.float32)
    for row, own in zip(rows, scores, strict=True):
        if own is not None:
            row[:width] = np.array(own, np.float32) * SCALE
            rest = 1 - float((row.astype(np.float64) ** 2).sum())
            row[width] = np.nextafter(np.float32(math.sqrt(rest)), np.float32(0))
            row[width + 1] = math.sqrt(rest - float(row[width]) ** 2)
    write_embeddings(path, EmbeddingSet(rows, np.array(people), fte=np.array([row is None for row in scores])))


def search(tmp_path: Path, *options: object) -> dict[str, Any]:
    out = tmp_path / "R.json"
    command = ["evaluate", "identification", "--probes", tmp_path / "P.npz", "--resamples", 0, "--out", out, *options]
    assert main(list(map(str, command))) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    keys = {"protocol", "protocol_version", "format_version", "rule", "counts", "metrics", "curves", "warnings"}
    assert keys | {"inputs", "preprocessing"} <= record.keys()
    assert (record["protocol"], record["protocol_version"]) == ("identification", 1)
    return record


@pytest.mark.parametrize("level", ["entry", "identity"])
def test_tv5_from_files(tmp_path: Path, level: str) -> None:
    v = VECTORS["TV5"]
    write_gallery(tmp_path / "G.npz", v["gallery"], 0, 7)
    write_probes(tmp_path / "P.npz", v["probes"], v["scores"])
    options = ["--ranks", "1,3,4", "--fpir", "0.25,0.5,0.75", "--candidates", 5, "--rank-level", level]
    record = search(tmp_path, "--gallery", tmp_path / "G.npz", *options)
    assert record["rank_level"] == level
    assert (record["counts"]["mated"], record["counts"]["non_mated"]) == (v["mated"], v["nonmated"])
    metrics = record["metrics"]
    if level == "identity":
        assert metrics["rank_3"]["value"] == v["cmc_identity_pess_3"]
        return
    assert [metrics[f"rank_{k}"]["value"] for k in (1, 3, 4)] == v["cmc_entry_pess_1_3_4"]
    assert set(metrics) == {"rank_1", "rank_3", "rank_4", *(f"tpir@fpir={rate}" for rate in ("0.25", "0.5", "0.75"))}
    for case, (tpir, realised) in v["tpir"].items():
        rate, rank = (part.split("=")[1] for part in case.split(","))
        entry = metrics[f"tpir@fpir={float(rate):g}"]
        assert entry["value" if rank == "1" else "value_rank_l"] == tpir
        assert entry["realised"] == realised
        assert entry["k"] == math.floor(4 * float(rate))
    known = [probe for probe, row in zip(v["probes"], v["scores"], strict=True) if row is not None]
    assert record["counts"]["fte_probes"] == len(v["probes"]) - len(known) == 2
    assert metrics["rank_4"]["value_enrolled_only"] == 1  # three of three, without the probe that failed


@pytest.mark.parametrize(
    ("rule", "name"), [("canonical", "tpir@.34_mean"), ("ijb_evals", "ijb_evals_rule"), ("ijb_1n", "ijb_1n_rule")]
)
def test_tv6_from_files(tmp_path: Path, rule: str, name: str) -> None:
    v = VECTORS["TV6"]
    write_gallery(tmp_path / "G1.npz", v["g1"], 0, 6)
    write_gallery(tmp_path / "G2.npz", v["g2"], 2, 6)
    write_probes(tmp_path / "P.npz", v["probes"], [one + two for one, two in zip(v["S1"], v["S2"], strict=True)])
    galleries = ["--gallery", tmp_path / "G1.npz", "--gallery-2", tmp_path / "G2.npz"]
    record = search(tmp_path, *galleries, "--ranks", "1,2", "--fpir", "0.34", "--rule", rule)
    assert record["rule"] == rule
    assert record["metrics"]["tpir@fpir=0.34"]["value"] == pytest.approx(v[name])
    first = record["metrics"]["rank_1"]
    assert set(record["metrics"]) == {"rank_1", "rank_2", "tpir@fpir=0.34"}
    if rule == "ijb_1n":
        assert first["value"] == v["rank1_concatenated"]
        return
    assert first["value"] == v["rank1_pooled"]
    assert first["mean_of_galleries"] == pytest.approx(v["rank1_mean_of_galleries"])
    assert record["counts"]["galleries"] == 2
    assert set(record["inputs"]["files"]) == {"G1.npz", "G2.npz", "P.npz"}
