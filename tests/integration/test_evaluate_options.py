"""Options that protocols share: qualities, uncertainty, thresholds of another set, lists and scores as files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from aroface.errors import DataError
from aroface.images import encode_jpeg
from launch.cli import main
from retrieval.embedding_files import read_embeddings, write_embeddings
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_identification
from retrieval.protocols.pair_sets import read_pair_set
from retrieval.quality_file import QualityFile
from tests.helpers.face_folders import write_faces
from tests.helpers.protocol_sets import (
    SAMPLES,
    TEMPLATES,
    embeddings_of,
    write_ijb,
    write_keyed,
    write_manifest,
    write_tinyface,
)
from tests.integration.test_protocol_commands import evaluate, unit

PEOPLE = 60
KEYS = [f"p{person}/p{person}_{i:04d}.jpg" for person in range(PEOPLE) for i in (1, 2)]


def write_pairs(path: Path) -> Path:
    lines = ["10\t6"]
    for fold in range(10):
        own = range(6 * fold, 6 * fold + 6)
        lines += [f"p{p}\t1\t2" for p in own] + [f"p{p}\t1\tp{(p + 1) % PEOPLE}\t2" for p in own]
    path.write_text("\n".join(lines))
    return path


def rated_faces(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Faces whose noise grows as their quality falls; the norms say nothing."""
    generator = np.random.default_rng(0)
    quality = generator.uniform(0, 1, len(KEYS))
    values = embeddings_of([row // 2 for row in range(len(KEYS))], noise=0.0)
    values = values + (3 * (1 - quality[:, None]) * generator.normal(size=values.shape)).astype(np.float32)
    return write_keyed(tmp_path / "e.npz", KEYS, values / np.linalg.norm(values, axis=1, keepdims=True)), quality


def test_xqlfw_takes_its_quality_scores(tmp_path: Path) -> None:
    file, quality = rated_faces(tmp_path)
    pairs = write_pairs(tmp_path / "pairs.txt")
    rows = [f"p{row // 2}\t{row % 2 + 1}\t{quality[row]:.6f}" for row in range(len(KEYS))]
    (tmp_path / "xqlfw_scores.txt").write_text("\n".join(["ID\tNum\tScore", *rows]))
    source = ["--pairs", pairs, "--embeddings", file, "--far", "0.1"]
    record = evaluate(tmp_path, "xqlfw", *source, "--quality", tmp_path / "xqlfw_scores.txt")
    curve = record["curves"]["edc"]
    assert curve["quality"] == "xqlfw_scores.txt"
    assert "xqlfw_scores.txt" in record["inputs"]["files"]
    assert curve["fnmr"][0] == pytest.approx(1 - record["metrics"]["tar@far=0.1"]["value"])
    assert curve["fnmr"][len(curve["fnmr"]) // 2] < curve["fnmr"][0]  # what is left out was wrong more often
    plain = evaluate(tmp_path, "xqlfw", *source)
    assert plain["curves"]["edc"]["quality"] == "norm"
    assert record["metrics"]["edc_area@0.3"]["value"] < plain["metrics"]["edc_area@0.3"]["value"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/1.jpg 0.5\na/1.jpg 0.6\n", r"line 2: a/1.jpg is listed a second time"),
        ("a/1.jpg high\nb/1.jpg high\n", "line 2: 'b/1.jpg high' is neither"),
        ("name quality\n", "lists no qualities"),
        ("a one 0.5\n", "neither `image quality` nor `person number quality`"),
    ],
)
def test_unusable_qualities(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        QualityFile(tmp_path / "q.txt")


def test_qualities_by_key_by_file_and_by_person_and_number(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("image,quality\na/1.jpg,0.5\n2.jpg,0.25\n")
    assert QualityFile(tmp_path / "q.csv").rate(["a/1.jpg", "x/2.jpg"]).tolist() == [0.5, 0.25]
    with pytest.raises(DataError, match="has no quality of b/3.jpg; it lists 'a/1.jpg' and 1 more"):
        QualityFile(tmp_path / "q.csv").rate(["b/3.jpg"])


def test_templates_fused_by_quality(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "set", TEMPLATES, SAMPLES)
    keys = [line.split(",")[2] for line in SAMPLES]
    values = embeddings_of([int(key[0]) for key in keys], noise=0.5)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    weights = {key: 0.0 if key == "1/c.jpg" else 1.0 for key in keys}
    (tmp_path / "q.txt").write_text("".join(f"{key} {weight}\n" for key, weight in weights.items()))
    source = ["--manifest", folder, "--embeddings", file, "--resamples", 0]
    lists = {}
    for name, more in {
        "weighted": ["--pooling", "QD0", "--quality", tmp_path / "q.txt"],
        "without": ["--pooling", "N0D0"],
        "norm": ["--pooling", "N1D0"],
        "norm-as-quality": ["--pooling", "QD0"],
    }.items():
        record = evaluate(tmp_path, "templates", *source, *more, "--save-candidates", tmp_path / f"{name}.csv")
        lists[name] = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    score = {name: float(next(row["score"] for row in rows if row["probe"] == "p1")) for name, rows in lists.items()}
    rows = unit(values.astype(float))
    assert score["weighted"] == pytest.approx(rows[keys.index("1/b.jpg")] @ rows[keys.index("1/a.jpg")], abs=1e-5)
    assert score["weighted"] != pytest.approx(score["without"], abs=1e-4)
    assert lists["norm"] == lists["norm-as-quality"]
    assert record["pooling"] == "QD0, F1"
    (tmp_path / "q.txt").write_text("".join(f"{key} -1\n" for key in keys))
    command = ["evaluate", "templates", *source, "--pooling", "QD0", "--quality", tmp_path / "q.txt", "--out", "r.json"]
    assert main(list(map(str, command))) == 2


def test_candidate_lists_are_the_best_entries_in_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    names = np.array([f"g{i}" for i in range(15)])
    fte = np.arange(15) == 3
    gallery = EmbeddingSet(generator.normal(size=(15, 6)).astype("f4"), np.arange(15) // 3, template_ids=names, fte=fte)
    probes = EmbeddingSet(generator.normal(size=(7, 6)).astype("f4"), np.arange(7), fte=np.arange(7) == 2)
    write_embeddings(tmp_path / "g.npz", gallery)
    write_embeddings(tmp_path / "p.npz", probes)
    source = ["--gallery", tmp_path / "g.npz", "--probes", tmp_path / "p.npz", "--candidates", 4]
    evaluate(tmp_path, "identification", *source, "--save-candidates", tmp_path / "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    scores = probes.unit() @ gallery.unit().T
    scores[:, fte] = -2
    assert {row["probe"] for row in rows} == set("013456")
    for probe in (0, 1, 3, 4, 5, 6):
        own = [row for row in rows if row["probe"] == str(probe)]
        assert [row["gallery"] for row in own] == names[np.argsort(-scores[probe])[:4]].tolist()
        assert [row["rank"] for row in own] == ["1", "2", "3", "4"]
        assert float(own[0]["score"]) == pytest.approx(scores[probe].max(), abs=1e-6)


def verification_set(tmp_path: Path, name: str, noise: float) -> list[object]:
    ids = np.arange(200) // 2
    values = embeddings_of(ids.tolist(), noise=noise, seed=len(name))
    metadata = {"model_id": "m", "flip": "sum", "contract": {"template": "arcface_112"}}
    write_embeddings(tmp_path / f"{name}.npz", EmbeddingSet(values, ids, metadata=metadata))
    pairs = [(i, i + 1, 1) for i in range(0, 200, 2)] + [(i, (i + 7) % 200, 0) for i in range(0, 200)]
    (tmp_path / "pairs.csv").write_text("index_a,index_b,label\n" + "\n".join(f"{a},{b},{c}" for a, b, c in pairs))
    return ["--embeddings", tmp_path / f"{name}.npz", "--pairs", tmp_path / "pairs.csv", "--far", "0.05,0.2"]


def test_thresholds_of_one_set_are_applied_to_another(tmp_path: Path) -> None:
    first = evaluate(tmp_path, "verification", *verification_set(tmp_path, "one", 0.5))
    (tmp_path / "result.json").rename(tmp_path / "first.json")
    more = ["--thresholds", tmp_path / "first.json", "--save-scores", tmp_path / "s.npy", "--resamples", 20]
    record = evaluate(tmp_path, "verification", *verification_set(tmp_path, "other", 1.5), *more)
    scores = np.load(tmp_path / "s.npy", allow_pickle=False)
    assert scores.dtype == np.float32
    for label in ("0.05", "0.2"):
        threshold = np.float32(first["metrics"][f"tar@far={label}"]["threshold"])
        found = {kind: record["metrics"][f"{kind}@frozen:far={label}"] for kind in ("fnmr", "fmr")}
        assert found["fnmr"]["value"] == pytest.approx((scores[:100] <= threshold).mean())
        assert found["fmr"]["value"] == pytest.approx((scores[100:] > threshold).mean())
        assert found["fmr"]["errors"] == (scores[100:] > threshold).sum()
        assert "k" not in found["fmr"]  # K is what a rate allows
        assert found["fmr"]["ci95"][0] <= found["fmr"]["value"] <= found["fmr"]["ci95"][1]
    assert "first.json" in record["inputs"]["files"]
    assert record["preprocessing"]["alignment"] == "unknown (model expects arcface_112)"


def test_thresholds_of_a_search_and_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(30, 8))
    write_embeddings(tmp_path / "g.npz", EmbeddingSet(centres[:20].astype("f4"), np.arange(20)))
    for name, noise in (("a", 0.3), ("b", 0.9)):
        values = np.repeat(centres, 4, 0) + noise * generator.normal(size=(120, 8))
        write_embeddings(tmp_path / f"{name}.npz", EmbeddingSet(values.astype("f4"), np.repeat(np.arange(30), 4)))
    search = ["--gallery", tmp_path / "g.npz", "--fpir", "0.1", "--resamples", 0]
    first = evaluate(tmp_path, "identification", *search, "--probes", tmp_path / "a.npz")
    (tmp_path / "result.json").rename(tmp_path / "first.json")
    more = ["--probes", tmp_path / "b.npz", "--thresholds", tmp_path / "first.json"]
    record = evaluate(tmp_path, "identification", *search, *more)
    result = evaluate_identification([read_embeddings(tmp_path / "g.npz")], read_embeddings(tmp_path / "b.npz"))
    found, threshold = result.searches[0], np.float32(first["metrics"]["tpir@fpir=0.1"]["threshold"])
    hits = found.is_mated & (found.rank <= 1) & (found.best > threshold)
    assert record["metrics"]["fnir@frozen:fpir=0.1"]["value"] == pytest.approx(1 - hits.sum() / found.is_mated.sum())
    alarms = (found.best > threshold)[~found.is_mated].mean()
    assert record["metrics"]["fpir@frozen:fpir=0.1"]["value"] == pytest.approx(alarms)
    command = ["evaluate", "verification", *verification_set(tmp_path, "one", 0.5)]
    command += ["--thresholds", tmp_path / "first.json", "--out", tmp_path / "r.json"]
    assert main(list(map(str, command))) == 2
    assert "holds no threshold of TAR; name one of the same kind" in capsys.readouterr().err
    evaluate(tmp_path, "verification", *verification_set(tmp_path, "one", 0.5), "--rule", "pfe_int")
    (tmp_path / "result.json").rename(tmp_path / "first.json")
    assert main(list(map(str, command))) == 2
    assert "made by the rule pfe_int" in capsys.readouterr().err


def test_mutual_likelihood_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = verification_set(tmp_path, "one", 1.0)
    command = ["evaluate", "verification", *source, "--similarity", "mls", "--out", tmp_path / "r.json"]
    assert main(list(map(str, command))) == 2
    assert "has no `variances`; --similarity mls and --pooling PFE need them" in capsys.readouterr().err
    plain = read_embeddings(tmp_path / "one.npz")
    variances = np.random.default_rng(3).uniform(0.05, 0.5, (200, 1)).astype(np.float32)
    write_embeddings(tmp_path / "one.npz", EmbeddingSet(plain.embeddings, plain.subject_ids, variances=variances))
    record = evaluate(tmp_path, "verification", *source, "--similarity", "mls", "--resamples", 0)
    assert record["similarity"] == "mls"
    left, right = plain.unit()[0::2], plain.unit()[1::2]
    total = (variances[0::2] + variances[1::2]).astype(float)
    genuine = -0.5 * (((left - right) ** 2 / total).sum(1) + left.shape[1] * np.log(total[:, 0]))
    entry = record["metrics"]["tar@far=0.2"]
    assert entry["value"] == pytest.approx((genuine.astype(np.float32) > np.float32(entry["threshold"])).mean())


def test_ijb_templates_by_precision(tmp_path: Path) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    values = embeddings_of(people, noise=1.0)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    found = read_embeddings(file)
    variances = np.full((len(found), 1), 0.3, np.float32)
    rated = EmbeddingSet(found.embeddings, found.subject_ids, keys=found.keys, variances=variances)
    write_embeddings(file, rated)
    more = ["--embeddings", file, "--pooling", "PFE", "--similarity", "mls", "--far", "0.1", "--resamples", 0]
    record = evaluate(tmp_path, "ijbc", "--meta", tmp_path / "meta", *more)
    assert record["pooling"].startswith("PFE")
    assert record["metrics"]["tar@far=0.1"]["value"] > 0.8


@pytest.mark.parametrize("column", ["template_ids", "keys"])
def test_a_template_listed_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str) -> None:
    rows = np.eye(3, dtype=np.float32)
    write_embeddings(tmp_path / "g.npz", EmbeddingSet(rows, np.arange(3)))
    write_embeddings(tmp_path / "p.npz", EmbeddingSet(rows, np.arange(3), **{column: np.array(["a", "b", "a"])}))
    command = ["evaluate", "identification", "--gallery", tmp_path / "g.npz", "--probes", tmp_path / "p.npz"]
    assert main(list(map(str, [*command, "--out", tmp_path / "r.json"]))) == 2
    assert f"{column} holds 'a' twice. A template is one row" in capsys.readouterr().err


def test_people_of_the_training_set_are_told(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {"p0": 2, "p7": 2, "somebody": 2})
    assert main(["pack", str(faces), str(tmp_path / "shards")]) == 0
    file, _ = rated_faces(tmp_path)
    source = ["--pairs", write_pairs(tmp_path / "pairs.txt"), "--embeddings", file]
    record = evaluate(tmp_path, "lfw", *source, "--trained-on", tmp_path / "shards")
    assert any("2 of 60 people are in the training set" in text and "(p0, p7)" in text for text in record["warnings"])
    assert not any("training set" in text for text in evaluate(tmp_path, "lfw", *source)["warnings"])


def write_arrow(path: Path, rows: list[tuple[Any, int, bool]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images, indices, same = zip(*rows, strict=True)
    table = pyarrow.table({"image": [{"bytes": i, "path": None} for i in images], "index": indices, "is_same": same})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_a_verification_set_that_datasets_saved(tmp_path: Path) -> None:
    images = [encode_jpeg(np.full((112, 112, 3), value, np.uint8)) for value in range(0, 240, 2)]
    rows = [(image, number, number // 2 % 2 == 0) for number, image in enumerate(images)]
    write_arrow(tmp_path / "set" / "data-00000-of-00002.arrow", rows[60:])  # files and rows in any order
    write_arrow(tmp_path / "set" / "data-00001-of-00002.arrow", rows[:60][::-1])
    found = read_pair_set(tmp_path / "set")
    assert found.images == images
    assert found.is_same == [pair % 2 == 0 for pair in range(60)]
    people = [p for pair in range(60) for p in ((pair, pair) if pair % 2 == 0 else (pair, pair + 60))]
    values = embeddings_of(people, noise=0.1)
    write_embeddings(tmp_path / "e.npz", EmbeddingSet(values, np.arange(120)))
    record = evaluate(tmp_path, "cplfw", "--bin", tmp_path / "set", "--embeddings", tmp_path / "e.npz")
    assert (record["counts"]["genuine"], record["counts"]["impostor"]) == (30, 30)
    assert record["metrics"]["tar@far=1e-2"]["ci95_method"] == "wilson"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(b"\xff\xd8\xff", 0, True)], "1 images are no pairs"),
        ([(b"\xff\xd8\xff", 0, True), (b"\xff\xd8\xff", 2, True)], "image 1 is missing or there twice"),
        ([(b"\xff\xd8\xff", 0, True), (b"\xff\xd8\xff", 1, False)], "are no pairs, each with one is_same"),
        ([(b"exe", 0, True), (b"exe", 1, True)], "image 0 is no JPEG or PNG"),
    ],
)
def test_unusable_saved_sets(tmp_path: Path, rows: list[tuple[bytes, int, bool]], message: str) -> None:
    write_arrow(tmp_path / "set" / "data.arrow", rows)
    with pytest.raises(DataError, match=message):
        read_pair_set(tmp_path / "set")


def test_folders_that_are_no_saved_sets(tmp_path: Path) -> None:
    (tmp_path / "lfw" / "meta").mkdir(parents=True)
    (tmp_path / "lfw" / "__attrs__").write_text("{}")
    with pytest.raises(DataError, match="is a bcolz folder, which is not read; give the .bin"):
        read_pair_set(tmp_path / "lfw")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as an Arrow file"):
        read_pair_set(tmp_path / "other")


def test_probes_by_condition_keep_the_threshold_and_pairs_are_compared_too(tmp_path: Path) -> None:
    people = 40
    templates = [f"g{p},{p},gallery,G," for p in range(people // 2)]
    templates += [f"p{p}{c},{p},probe,,{c}" for p in range(people) for c in ("near", "far")]
    samples = [f"{line.split(',')[0]},m,{line.split(',')[0]}.jpg" for line in templates]
    folder = write_manifest(tmp_path / "set", templates, samples)
    keys = [line.split(",")[2] for line in samples]
    ids = [int(line.split(",")[1]) for line in templates]
    values = embeddings_of(ids, noise=1.0)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    source = ["--manifest", folder, "--embeddings", file, "--condition", "distance", "--resamples", 0]
    record = evaluate(tmp_path, "templates", *source, "--fpir", "0.1", "--far", "0.05")
    strata = record["conditions"]
    assert set(strata) == {"distance=near", "distance=far"}
    alarms = [(s["counts"]["non_mated"], s["metrics"]["fpir@fpir=0.1"]["value"]) for s in strata.values()]
    total = sum(count for count, _ in alarms)
    assert sum(c * v for c, v in alarms) / total == pytest.approx(record["metrics"]["tpir@fpir=0.1"]["realised"])
    assert (record["counts"]["genuine"], record["counts"]["impostor"]) == (40, 80 * 20 - 40)
    assert record["metrics"]["tar@far=0.05"]["k"] == int(0.05 * 1560)
    rows = unit(values.astype(np.float64))
    scores, same = rows[20:] @ rows[:20].T, np.array(ids[20:])[:, None] == np.array(ids[:20])
    accepted = scores > record["metrics"]["tar@far=0.05"]["threshold"]
    for place, name in enumerate(("near", "far")):
        block, own = strata[f"distance={name}"], np.arange(80) % 2 == place
        assert (block["counts"]["genuine"], block["counts"]["impostor"]) == (20, 40 * 20 - 20)
        assert block["metrics"]["tar@far=0.05"]["value"] == accepted[own][same[own]].mean()
        assert block["metrics"]["fmr@far=0.05"]["value"] == accepted[own][~same[own]].mean()
        assert block["metrics"]["tpir@fpir=0.1"]["value_rank_l"] >= block["metrics"]["tpir@fpir=0.1"]["value"]


def test_details_of_embedding_files_can_be_compared(tmp_path: Path) -> None:
    keys, people = write_tinyface(tmp_path / "lists")
    assert len(keys) == len(people)
    for name, noise in (("a", 0.5), ("b", 1.5)):
        source = verification_set(tmp_path, name, noise)
        evaluate(tmp_path, "verification", *source, "--resamples", 0, "--details", tmp_path / f"{name}-d.npz")
    out = tmp_path / "c.json"
    command = ["evaluate", "compare", tmp_path / "a-d.npz", tmp_path / "b-d.npz", "--far", "0.2", "--out", out]
    assert main(list(map(str, [*command, "--resamples", 50]))) == 0
    assert json.loads(out.read_text())["metrics"]["tar@far=0.2"]["value"] > 0


def test_a_model_whose_colour_order_is_unknown_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onnx import TensorProto, helper, save

    shape = ["n", 112, 112, 3]
    node = helper.make_node("Identity", ["images"], ["embedding"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "embedding")]
    save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]), ir_version=9), tmp_path / "m.onnx")
    faces = write_faces(tmp_path / "faces", {"001": 1})
    source = ["--model", tmp_path / "m.onnx", "--images", faces, "--out", tmp_path / "r.json"]
    assert main(list(map(str, ["evaluate", "scface", *source]))) == 2
    error = capsys.readouterr().err
    assert "carries no complete input contract" in error
    assert "colour_order" in error
    assert "Without it the preprocessing would be a guess" in error


def test_probes_that_are_enrolled_themselves_are_told(tmp_path: Path) -> None:
    values = embeddings_of([row // 2 for row in range(6)], noise=0.1)
    values[0] = 0  # a failure is no copy of another failure
    keys = np.array(KEYS[:6])
    people = np.array([key.split("/")[0] for key in keys])
    write_embeddings(tmp_path / "g.npz", EmbeddingSet(values[:4], people[:4], keys=keys[:4]))
    write_embeddings(tmp_path / "p.npz", EmbeddingSet(values[[0, 2, 5]], people[[0, 2, 5]], keys=keys[[0, 2, 5]]))
    write_embeddings(tmp_path / "other.npz", EmbeddingSet(values[4:] * 2, people[4:], keys=keys[:2]))
    search = ["--gallery", tmp_path / "g.npz"]
    warnings = evaluate(tmp_path, "identification", *search, "--probes", tmp_path / "p.npz")["warnings"]
    assert any("1 of 3 probes are enrolled" in warning and KEYS[2] in warning for warning in warnings)
    fine = evaluate(tmp_path, "identification", *search, "--probes", tmp_path / "other.npz")["warnings"]
    assert not any("are enrolled" in warning for warning in fine)
