"""Every protocol from its own files to its result record, against plain loops where the numbers are not obvious."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aroface.images import encode_jpeg
from launch.cli import main
from retrieval.details import pair_details, write_details
from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet
from tests.helpers.protocol_sets import (
    SAMPLES,
    TEMPLATES,
    embeddings_of,
    write_ijb,
    write_ijbs,
    write_keyed,
    write_manifest,
    write_survface,
    write_tinyface,
)


def evaluate(tmp_path: Path, protocol: str, *options: object) -> dict[str, Any]:
    out = tmp_path / "result.json"
    assert main(["evaluate", protocol, *map(str, options), "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["rule"]
    assert record["preprocessing"]["alignment"]
    assert record["counts"]
    return record


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_tinyface_with_mean_average_precision(tmp_path: Path) -> None:
    keys, people = write_tinyface(tmp_path / "lists")
    values = embeddings_of(people, noise=1.5)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    record = evaluate(tmp_path, "tinyface", "--lists", tmp_path / "lists", "--embeddings", file, "--resamples", 50)
    rows = unit(values.astype(np.float64))
    probes, gallery = rows[:12], rows[12:]
    names = np.array(people)
    hits, precisions = [], []
    for probe, person in zip(probes, names[:12], strict=True):
        order = np.argsort(-(gallery @ probe), kind="stable")
        is_mate = names[12:][order] == person
        hits.append(is_mate[0])
        recall = precision = area = 0.0
        precision_before = 1.0
        for place, mate in enumerate(is_mate, 1):  # the official loop: precision at every rank
            found = is_mate[:place].sum()
            precision = found / place
            if mate:
                area += (precision_before + precision) / 2 / is_mate.sum()
            precision_before = precision
            recall = found / is_mate.sum()
        assert recall == 1
        precisions.append(area)
    assert record["metrics"]["rank_1"]["value"] == pytest.approx(np.mean(hits))
    assert record["metrics"]["map"]["value"] == pytest.approx(np.mean(precisions))
    assert 0 < np.mean(hits) < 1
    assert record["counts"]["distractors"] == 20
    assert any("the original has 3728" in warning for warning in record["warnings"])
    for name in ("rank_1", "map"):
        entry = record["metrics"][name]
        assert "subject bootstrap" in entry["ci95_method"]
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]


def test_tinyface_images_that_are_missing_are_misses(tmp_path: Path) -> None:
    keys, people = write_tinyface(tmp_path / "lists")
    values = embeddings_of(people, noise=0.1)
    kept = [row for row, key in enumerate(keys) if key != "Probe/1_3.jpg"]
    file = write_keyed(tmp_path / "e.npz", [keys[row] for row in kept], values[kept])
    record = evaluate(tmp_path, "tinyface", "--lists", tmp_path / "lists", "--embeddings", file, "--resamples", 0)
    assert record["metrics"]["rank_1"]["value"] == pytest.approx(11 / 12)
    assert record["counts"]["missing"] == record["counts"]["fte_probes"] == 1


def ijb_templates(meta: Path, values: np.ndarray, name: str) -> dict[int, np.ndarray]:
    """Templates by the definition: N1D1, mean per media, sum, unit."""
    joined = [line.split() for line in (meta / f"{name}_face_tid_mid.txt").read_text().splitlines()]
    scores = [float(line.split()[-1]) for line in (meta / f"{name}_name_5pts_score.txt").read_text().splitlines()]
    media: dict[int, dict[int, list[np.ndarray]]] = {}
    for row, ((_, template, medium), score) in enumerate(zip(joined, scores, strict=True)):
        media.setdefault(int(template), {}).setdefault(int(medium), []).append(score * values[row].astype(np.float64))
    return {t: unit(sum(np.mean(v, axis=0) for v in own.values())) for t, own in media.items()}


@pytest.mark.parametrize("name", ["ijbb", "ijbc"])
def test_ijb_pairs_and_search(tmp_path: Path, name: str) -> None:
    meta = tmp_path / "meta"
    keys, people = write_ijb(meta, name=name)
    values = embeddings_of(people, noise=2.5)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    templates = ijb_templates(meta, values, name)
    source = ["--meta", meta, "--embeddings", file, "--resamples", 30]
    record = evaluate(tmp_path, name, *source, "--far", "0.1")
    pairs = np.loadtxt(meta / f"{name}_template_pair_label.txt", dtype=int)
    scores = np.array([templates[a] @ templates[b] for a, b, _ in pairs])
    genuine, impostor = scores[pairs[:, 2] == 1], np.sort(scores[pairs[:, 2] == 0])[::-1]
    threshold = impostor[int(0.1 * len(impostor) + 1e-9)]
    found = record["metrics"]["tar@far=0.1"]
    assert found["value"] == pytest.approx((genuine > threshold).mean())
    assert found["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
    assert record["pooling"] == "N1D1, F1"

    record = evaluate(tmp_path, name, *source, "--task", "1:N", "--fpir", "0.5")
    subject = dict(zip(templates, np.repeat(range(8), 3), strict=True))
    gallery = [t for i, t in enumerate(templates) if i % 3 == 0]
    probes = [t for i, t in enumerate(templates) if i % 3 != 0]
    hits = 0
    for half in (gallery[:4], gallery[4:]):
        for probe in probes:
            best = max(half, key=lambda t: float(templates[t] @ templates[probe]))
            hits += subject[best] == subject[probe]
    assert record["metrics"]["rank_1"]["value"] == pytest.approx(hits / 16)
    assert record["counts"]["mated"] == record["counts"]["non_mated"] == 16
    assert len(record["metrics"]["tpir@fpir=0.5"]["galleries"]) == 2
    merged = evaluate(tmp_path, name, *source, "--task", "1:N", "--fpir", "0.5", "--rule", "ijb_1n")
    assert merged["counts"]["galleries"] == 1


def test_ijbc_covariates(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    keys, people = write_ijb(meta)
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=2.5))
    table = tmp_path / "covariates.csv"
    listed = sorted({int(line.split()[1]) for line in (meta / "ijbc_face_tid_mid.txt").read_text().splitlines()})
    lines = [f"{t},{(t - 100) // 10},{'far' if t % 20 < 10 else 'near'}" for t in listed]
    table.write_text("TEMPLATE_ID,SUBJECT_ID,RANGE\n" + "\n".join(lines) + "\n")
    more = ["--covariates", table, "--covariate", "RANGE", "--resamples", 0, "--far", "0.1"]
    record = evaluate(tmp_path, "ijbc", "--meta", meta, "--embeddings", file, *more)
    strata = record["conditions"]
    assert set(strata) == {"RANGE=far", "RANGE=near"}
    total = sum(s["counts"]["genuine"] for s in strata.values())
    accepted = sum(s["counts"]["genuine"] * s["metrics"]["tar@far=0.1"]["value"] for s in strata.values())
    assert total == record["counts"]["genuine"]
    assert accepted / total == pytest.approx(record["metrics"]["tar@far=0.1"]["value"])


@pytest.mark.parametrize(
    ("task", "probes", "missing"),
    [
        ("surveillance_to_single", 12, 1),
        ("surveillance_to_booking", 12, 1),
        ("surveillance_to_surveillance", 12, 1),
        ("multiview_to_booking", 6, 0),
        ("uav_to_booking", 6, 0),
    ],
)
def test_ijbs(tmp_path: Path, task: str, probes: int, missing: int) -> None:
    keys, people = write_ijbs(tmp_path / "cs6")
    values = embeddings_of(people, noise=0.2)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    source = ["--task", task, "--protocol", tmp_path / "cs6", "--embeddings", file, "--resamples", 20]
    record = evaluate(tmp_path, "ijbs", *source, "--fpir", "0.34")
    assert record["counts"]["probes"] == record["counts"]["mated"] == probes
    assert record["counts"]["fte_probes"] == missing  # the video in which nobody was detected is a miss
    assert record["metrics"]["rank_1"]["value"] == pytest.approx((probes - missing) / probes)
    assert record["pooling"].startswith("N1D0, flat")
    assert len(record["metrics"]["tpir@fpir=0.34"]["galleries"]) == 2


def test_survface(tmp_path: Path) -> None:
    keys, people = write_survface(tmp_path / "lists")
    values = embeddings_of(people, noise=0.4)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    record = evaluate(tmp_path, "survface", "--root", tmp_path / "lists", "--embeddings", file, "--resamples", 0)
    assert record["counts"]["gallery"] == 5
    assert (record["counts"]["mated"], record["counts"]["non_mated"]) == (10, 8)
    assert record["candidates"] == 20
    rows = unit(values.astype(np.float64))
    gallery = np.stack([unit(rows[:15][np.array(people[:15]) == person].mean(0)) for person in range(1, 6)])
    alarms = np.sort((rows[25:] @ gallery.T).max(1))[::-1]
    own = (rows[15:25] * gallery[np.array(people[15:25]) - 1]).sum(1)
    assert record["metrics"]["tpir@fpir=0.3"]["value_rank_l"] == pytest.approx((own > alarms[2]).mean())
    record = evaluate(
        tmp_path, "survface", "--task", "verification", "--root", tmp_path / "lists", "--embeddings", file
    )
    assert (record["counts"]["genuine"], record["counts"]["impostor"]) == (2, 2)
    assert record["metrics"]["auc"]["value"] == 1.0


def test_scface(tmp_path: Path) -> None:
    keys = [f"{s:03d}_frontal.jpg" for s in range(1, 5)]
    keys += [f"{s:03d}_cam{c}_{d}.jpg" for s in range(1, 5) for c in range(1, 8) for d in (1, 2, 3)]
    people = [int(key[:3]) for key in keys]
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=0.1))
    record = evaluate(tmp_path, "scface", "--embeddings", file, "--resamples", 0)
    assert record["counts"]["probes"] == 60  # five cameras; 6 and 7 see infrared
    assert [record["metrics"][f"rank_1@d{d}"]["value"] for d in (1, 2, 3)] == [1, 1, 1]
    (tmp_path / "test.txt").write_text("001\n003\n")
    record = evaluate(tmp_path, "scface", "--embeddings", file, "--subjects", tmp_path / "test.txt", "--resamples", 0)
    assert (record["counts"]["gallery"], record["counts"]["probes"]) == (2, 30)


def test_templates_from_a_manifest(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "set", TEMPLATES, SAMPLES)
    keys = [line.split(",")[2] for line in SAMPLES]
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of([int(key[0]) for key in keys], noise=0.1))
    options = ["--manifest", folder, "--embeddings", file, "--condition", "distance", "--resamples", 0, "--fpir", "1"]
    record = evaluate(tmp_path, "templates", *options)
    assert record["metrics"]["rank_1"]["value"] == pytest.approx(2 / 3)  # p4 has no samples: mated, and a miss
    assert record["counts"]["fte_probes"] == 1
    assert record["conditions"]["distance=5"]["metrics"]["rank_1"]["value"] == 1
    assert record["conditions"]["distance=10"]["counts"]["mated"] == 2


def test_a_set_without_strangers_has_no_open_set_rate(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "set", TEMPLATES[:4], SAMPLES[:5])
    keys = [line.split(",")[2] for line in SAMPLES[:5]]
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of([int(key[0]) for key in keys], noise=0.1))
    record = evaluate(tmp_path, "templates", "--manifest", folder, "--embeddings", file, "--resamples", 0)
    assert record["metrics"]["tpir@fpir=0.01"]["value"] is None
    assert record["metrics"]["tpir@fpir=0.01"]["reason"] == "no non-mated searches"
    assert record["metrics"]["rank_1"]["value"] == 1


@pytest.mark.parametrize(
    ("templates", "samples", "message"),
    [
        ([*TEMPLATES, "p1,1,probe,,5"], SAMPLES, "template 'p1' twice"),
        (["g1,1,galery,G,"], SAMPLES, "role 'galery'"),
        (TEMPLATES, [*SAMPLES, "px,m,1/a.jpg"], "template 'px' is not in"),
        (TEMPLATES[:2], SAMPLES[:2], "lacks a probe"),
        ([*TEMPLATES, "p9,1,probe,"], SAMPLES, "line 8 has 4 fields"),
    ],
)
def test_unusable_manifests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], templates: list[str], samples: list[str], message: str
) -> None:
    folder = write_manifest(tmp_path / "set", templates, samples)
    file = write_keyed(tmp_path / "e.npz", ["1/a.jpg"], embeddings_of([1]))
    command = ["evaluate", "templates", "--manifest", folder, "--embeddings", file, "--out", tmp_path / "r.json"]
    assert main(list(map(str, command))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_pairs_of_a_list_in_both_forms(tmp_path: Path) -> None:
    keys = [f"p{person}/p{person}_{i:04d}.jpg" for person in range(60) for i in (1, 2)]
    values = embeddings_of([row // 2 for row in range(120)], noise=0.1)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    lines, listed = ["10\t6"], ["file label"]
    for fold in range(10):
        own = range(6 * fold, 6 * fold + 6)
        lines += [f"p{p}\t1\t2" for p in own] + [f"p{p}\t1\tp{(p + 1) % 60}\t2" for p in own]
    for label in (1, 0):
        for p in range(60):
            listed += [f"p{p}_0001.jpg {label}", f"p{p if label else (p + 1) % 60}_0002.jpg {label}"]
    for number, text in enumerate((lines, listed)):
        (tmp_path / f"pairs{number}.txt").write_text("\n".join(text))
        record = evaluate(tmp_path, "calfw", "--pairs", tmp_path / f"pairs{number}.txt", "--embeddings", file)
        assert (record["counts"]["genuine"], record["counts"]["impostor"]) == (60, 60)
        assert record["metrics"]["accuracy"]["value"] > 0.95
        assert len(record["metrics"]["accuracy"]["folds"]) == 10


def test_a_folder_without_folders_does_not_make_one_person_of_all(tmp_path: Path) -> None:
    keys = [f"p{person}_{i:04d}.jpg" for person in range(60) for i in (1, 2)]
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of([row // 2 for row in range(120)], noise=1.0))
    listed = ["file label"]
    for label in (1, 0):
        for p in range(60):
            listed += [f"p{p}_0001.jpg {label}", f"p{p if label else (p + 1) % 60}_0002.jpg {label}"]
    (tmp_path / "pairs.txt").write_text("\n".join(listed))
    far = ["--far", "0.1"]
    record = evaluate(tmp_path, "calfw", "--pairs", tmp_path / "pairs.txt", "--embeddings", file, *far)
    tar = record["metrics"]["tar@far=0.1"]
    assert 0 < tar["value"] < 1
    low, high = tar["ci95"]
    assert high - low > 0.05  # 60 pairs


def test_pairs_of_a_bin_without_contract(tmp_path: Path) -> None:
    import pickle

    image = encode_jpeg(np.zeros((112, 112, 3), np.uint8))
    same = [pair % 2 == 0 for pair in range(120)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([image] * 240, same)))
    people = [person for pair, s in enumerate(same) for person in ((pair, pair) if s else (pair, pair + 120))]
    values = embeddings_of(people, noise=0.1)
    write_embeddings(tmp_path / "e.npz", EmbeddingSet(values, np.arange(240)))
    record = evaluate(tmp_path, "lfw", "--bin", tmp_path / "lfw.bin", "--embeddings", tmp_path / "e.npz")
    assert record["metrics"]["accuracy"]["value"] > 0.95
    assert any("do not say how" in warning for warning in record["warnings"])
    assert record["preprocessing"]["alignment"] == "unknown"


def details_of(tmp_path: Path, noise: float, name: str, keys: list[str], people: list[int]) -> Path:
    file = write_keyed(tmp_path / f"{name}.npz", keys, embeddings_of(people, noise=noise))
    path = tmp_path / f"{name}-details.npz"
    source = ["--lists", tmp_path / "lists", "--embeddings", file, "--resamples", 0, "--details", path]
    evaluate(tmp_path, "tinyface", *source)
    return path


def test_two_systems_are_compared_search_by_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, people = write_tinyface(tmp_path / "lists")
    good, bad = (details_of(tmp_path, noise, f"n{noise}", keys, people) for noise in (0.1, 2.5))
    record = evaluate_compare(tmp_path, good, bad)
    entry = record["metrics"]["rank_1"]
    assert entry["value"] == pytest.approx(entry["first"] - entry["second"])
    assert entry["first"] == 1.0
    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    lost = round(12 * (1 - entry["second"]))
    assert entry["p_value"] == pytest.approx(2 * 0.5**lost)  # all that differ go one way
    swapped = evaluate_compare(tmp_path, bad, good)["metrics"]["rank_1"]
    assert swapped["value"] == -entry["value"]
    equal = evaluate_compare(tmp_path, good, good)["metrics"]["rank_1"]
    assert (equal["value"], equal["ci95"], equal["p_value"]) == (0.0, [0.0, 0.0], 1.0)
    assert record["rule"] == "canonical"
    assert set(record["preprocessing"]) == {"a", "b"}
    capsys.readouterr()
    (tmp_path / "lists2").mkdir()
    other = tmp_path / "other.npz"
    np.savez(other, **{**np.load(good), "subjects": np.arange(12)})
    assert main(["evaluate", "compare", str(good), str(other), "--out", str(tmp_path / "r.json")]) == 2
    assert "differ in subjects" in capsys.readouterr().err


def evaluate_compare(tmp_path: Path, first: Path, second: Path) -> dict[str, Any]:
    out = tmp_path / "compare.json"
    assert main(["evaluate", "compare", str(first), str(second), "--resamples", "200", "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_two_systems_are_compared_pair_by_pair(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    keys, people = write_ijb(meta)
    files = []
    for noise in (1.0, 3.0):
        file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=noise))
        files.append(tmp_path / f"{noise}.npz")
        more = ["--resamples", 0, "--far", "0.1", "--details", files[-1]]
        evaluate(tmp_path, "ijbc", "--meta", meta, "--embeddings", file, *more)
    out = tmp_path / "compare.json"
    command = ["evaluate", "compare", *map(str, files), "--far", "0.1", "--resamples", "100", "--out", str(out)]
    assert main(command) == 0
    entry = json.loads(out.read_text())["metrics"]["tar@far=0.1"]
    assert entry["value"] == pytest.approx(entry["first"] - entry["second"])
    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    assert entry["value"] > 0
    assert json.loads(out.read_text())["rule"] == "canonical"


def test_ranks_of_two_rules_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "e.npz", EmbeddingSet(embeddings_of([0, 1, 2, 3], noise=0.1), np.arange(4)))
    paths = {}
    for rule in ("canonical", "argsort_rev"):
        paths[rule] = tmp_path / f"{rule}.npz"
        source = ["--gallery", tmp_path / "e.npz", "--probes", tmp_path / "e.npz", "--resamples", 0]
        evaluate(tmp_path, "identification", *source, "--rule", rule, "--details", paths[rule])
    assert evaluate_compare(tmp_path, paths["argsort_rev"], paths["argsort_rev"])["rule"] == "argsort_rev"
    capsys.readouterr()
    command = ["evaluate", "compare", *map(str, paths.values()), "--out", str(tmp_path / "r.json")]
    assert main(command) == 2
    assert "differ in rule" in capsys.readouterr().err


@pytest.mark.parametrize(("same", "absent"), [(True, "impostor"), (False, "genuine")])
def test_pairs_of_one_kind_have_no_rate_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], same: bool, absent: str
) -> None:
    sides = (np.arange(4), np.arange(4) + (0 if same else 1))
    details = pair_details(np.linspace(0, 1, 4, dtype=np.float32), np.full(4, same), sides)
    path = tmp_path / "d.npz"
    write_details(path, details, protocol="verification", rule="canonical", preprocessing={})
    assert main(["evaluate", "compare", str(path), str(path), "--out", str(tmp_path / "r.json")]) == 2
    assert f"holds no {absent} pair" in capsys.readouterr().err


def test_resamples_below_zero_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "tinyface", "--lists", "x", "--embeddings", "e.npz", "--out", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--resamples", "-1"])
    assert ended.value.code == 2
    assert "'-1' is not a whole number of at least 0" in capsys.readouterr().err
