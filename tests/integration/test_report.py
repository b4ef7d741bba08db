"""Reports of one and of several systems: every figure and table that the records have the numbers for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_identification, evaluate_pairs
from retrieval.metrics.identification import identification_by_stratum
from retrieval.report.published import published_rows
from retrieval.results import identification_record, metric, result_record, strata_records, verification_record

MODEL = {"contract": {"image_size": 112, "colour_order": "bgr"}}


def pairs_record(name: str, shift: float, *, rule: str = "canonical", protocol: str = "ijbc-11") -> dict[str, Any]:
    generator = np.random.default_rng(0)
    genuine, impostor = generator.normal(shift, 0.15, 400), generator.normal(0, 0.15, 5000)
    scores = np.concatenate([genuine, impostor]).clip(-1, 1).astype(np.float32)
    scores[:3] = -np.inf
    same = np.arange(5400) < 400
    result = evaluate_pairs(scores, same, fars=[1e-4, 1e-2], rule=rule)  # type: ignore[arg-type]
    parts = verification_record(result, far_labels=["1e-4", "1e-2"], quality=genuine.astype(np.float32))
    parts["conditions"] = {
        f"RANGE={place}": {
            "counts": {"genuine": 200, "impostor": 2500},
            "metrics": {f"{kind}@far=1e-2": metric(0.5) for kind in ("tar", "fmr")},
            "curves": {},
        }
        for place in ("near", "far")
    }
    described = {"contract": MODEL["contract"], "alignment": "arcface_112", "flip": "sum"}
    more = {"model": {"model_id": name}, "preprocessing": described, "pooling": "N1D1, F1"}
    return result_record(protocol, rule, **parts, **more)


def search_record(name: str, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(12, 8))
    ids = generator.integers(0, 12, 60)
    values = (centres[ids] + 1.2 * generator.normal(size=(60, 8))).astype(np.float32)
    probes = EmbeddingSet(values, ids, fte=np.arange(60) == 4)
    enrolled = centres.astype(np.float32)
    parts_of = [EmbeddingSet(enrolled[half], np.arange(12)[half]) for half in (np.s_[:6], np.s_[6:])]
    result = evaluate_identification(parts_of, probes, fpirs=[0.1, 0.5])
    parts = identification_record(result, fpir_labels=["0.1", "0.5"])
    strata = identification_by_stratum(result, np.arange(60) % 2)
    parts["conditions"] = strata_records(strata, "distance", fpir_labels=["0.1", "0.5"])
    return result_record("templates", "canonical", **parts, model={"model_id": name})


def report(tmp_path: Path, records: list[dict[str, Any]], *options: str) -> tuple[str, str, set[str]]:
    paths = []
    for number, record in enumerate(records):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(record, allow_nan=False))
    out = tmp_path / "report"
    assert main(["report", *map(str, paths), "--out", str(out), *options]) == 0
    plots = {path.name for path in (out / "plots").iterdir()}
    assert {name.replace(".svg", ".png") for name in plots} == {name for name in plots if name.endswith(".png")}
    assert json.loads((out / "results.json").read_text())["results"] == records
    return (out / "report.md").read_text(), (out / "report.html").read_text(), plots


def test_pairs_of_three_systems_side_by_side(tmp_path: Path) -> None:
    records = [pairs_record(name, shift) for name, shift in (("one", 0.5), ("two", 0.6), ("three", 0.7))]
    text, page, plots = report(tmp_path, records, "--names", "A,B,C")
    figures = ("det", "fmr-threshold", "scores", "edc", "range-tar", "range-fmr")
    assert {f"ijbc-11-{name}.svg" for name in figures} <= plots
    assert "| metric | A | B | C |" in text
    for record, label in zip(records, "ABC", strict=True):
        entry = record["metrics"]["tar@far=1e-2"]
        k, realised, threshold = entry["k"], entry["realised"], entry["threshold"]
        row = next(line for line in text.splitlines() if line.startswith(f"| TAR at FAR 1 % | {label} |"))
        assert f"| {100 * entry['value']:.2f} % |" in row  # every cell with its K, realised rate, threshold and rule
        assert f"| {k} | {realised:.2e} | {threshold:.4f} | canonical |" in row
    assert "| TAR at FAR 1e-4 | A |" in text
    for mark, far in (("\\*\\*", "1e-4"), ("", "1 %")):  # 5,000 impostors: K is 0 and 50
        row = next(line for line in text.splitlines() if line.startswith(f"| TAR at FAR {far} | A |"))
        assert row.split("|")[3].strip().partition("%")[2].strip() == mark
    assert "\\*\\* not even one: the rate is undefined" in text
    assert records[0]["metrics"]["tar@far=1e-4"]["extrapolated"]
    assert any("FAR 1e-4: the data allow no false positive at all" in said for said in records[0]["warnings"])
    enrolled = records[0]["metrics"]["tar@far=1e-2"]["value_enrolled_only"]
    row = next(line for line in text.splitlines() if line.startswith("| TAR at FAR 1 % where both sides were enrolled"))
    assert f"| {100 * enrolled:.2f} % |" in row
    assert "| pairs with a side that failed | 3 | 3 | 3 |" in text
    assert "112 px BGR" in text
    assert page.count("<svg") == len(plots) // 2
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_published_values_stand_beneath_ours_with_the_rule_of_their_source(tmp_path: Path) -> None:
    text, _, _ = report(tmp_path, [pairs_record("ours", 0.6, rule="nearest")])
    lines = text[text.index("Beside published values") :].splitlines()
    ours = next(line for line in lines if "this evaluation" in line)
    assert "nearest; N1D1F1" in ours
    row = next(line for line in lines if line.startswith("| AdaFace, R100 | WebFace12M"))
    assert "nearest; N1D0F1" in row
    assert "97.66 %" in row
    assert "AdaFace README" in row


def test_published_rows_are_shares_of_known_protocols() -> None:
    rows = published_rows()
    assert len(rows) > 90
    for row in rows:
        assert row.rule
        assert row.source
        assert all(0 < value <= 1 for value in row.metrics.values())
    best = {row.metrics["rank_1"] for row in rows if row.protocol == "tinyface" and "ARoFace" in row.method}
    assert max(best) == 0.74
    protocols = {row.protocol for row in rows}
    assert {"tinyface", "ijbb-11", "ijbc-11", "ijbc-1N", "ijbs-surveillance_to_single", "lfw"} <= protocols


def test_searches_of_two_galleries(tmp_path: Path) -> None:
    text, _, plots = report(tmp_path, [search_record("m", 3)])
    assert {f"templates-{n}.png" for n in ("cmc", "fnir-fpir", "fpir-threshold", "search-scores")} <= plots
    assert "templates-distance-rank-1.png" in plots
    assert "By distance" in text
    assert "probes that failed to enrol" in text
    assert "Rank-1 where both sides were enrolled" in text


def test_misalignment_of_two_models_is_one_figure(tmp_path: Path) -> None:
    def record(name: str, factor: float) -> dict[str, Any]:
        keys = ("rank_1", "tar@far=1e-2", "fnmr_frozen", "fmr_frozen")
        points = [
            {
                "severity": level,
                "nme": level / 35,
                "metrics": dict.fromkeys(keys, factor / (1 + level)),
                "sd": dict.fromkeys(keys, 0.01),
            }
            for level in (0, 4, 12)
        ]
        metrics = {key: metric(factor) for key in keys[:2]} | {"area_rank_1@shift": metric(0.5)}
        sweeps = [{"name": "shift", "unit": "px", "points": points}]
        return result_record(
            "fae-1", "canonical", counts={"probes": 5}, metrics=metrics, sweeps=sweeps, set="tinyface"
        ) | {"model": {"model_id": name}}

    text, _, plots = report(tmp_path, [record("one", 0.8), record("two", 0.9)])
    assert {f"fae-1-tinyface-{n}.png" for n in ("rank_1", "tar-far-1e-2", "frozen", "change")} <= plots
    assert "on tinyface" in text
    assert "| shift | 4 px | one | 0.114 |" in text
    assert "| Rank-1, mean over shift | 50.0 % | 50.0 % |" in text


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--names", "A"], "--names holds 1 names for 2 results"),
        ({}, ["--names", "A,A"], "--names calls two results of ijbc-11 'A'"),
        ({"genuine": 7}, [], "do not belong side by side: genuine 400 and 7"),
    ],
)
def test_what_cannot_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, int], options: list[str], message: str
) -> None:
    one, two = pairs_record("one", 0.5), pairs_record("two", 0.6)
    two["counts"] |= change
    for number, record in enumerate((one, two)):
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert main(["report", *paths, "--out", str(tmp_path / "report"), *options]) == 2
    assert message in capsys.readouterr().err


def test_two_versions_of_a_protocol_do_not_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = pairs_record("one", 0.5), pairs_record("two", 0.6) | {"protocol_version": 2}
    for number, record in enumerate((one, two)):
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert main(["report", *paths, "--out", str(tmp_path / "report")]) == 2
    assert "are of versions 1 and 2 of the protocol" in capsys.readouterr().err


def test_values_to_compare_with(tmp_path: Path) -> None:
    rows = {"rows": [{"protocol": "ijbc-11", "metric": "tar@far=0.01", "value": 0.5, "source": "Table 1"}]}
    (tmp_path / "references.json").write_text(json.dumps(rows))
    record = pairs_record("m", 0.6)
    text, _, _ = report(tmp_path, [record], "--references", str(tmp_path / "references.json"))
    ours = record["metrics"]["tar@far=1e-2"]["value"]
    assert f"{100 * (ours - 0.5):+.1f} pp" in text
    assert "Table 1" in text
