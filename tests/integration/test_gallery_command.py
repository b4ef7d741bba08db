"""`aroface gallery` from build to calibrated search, on a directory and on Milvus Lite."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from retrieval.embedding_files import write_embeddings, write_index
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import Gallery
from tests.helpers.milvus_places import MilvusPlace, milvus_place

DIM = 16


def _write(path: Path, rows: slice, seed: int, **columns: Any) -> str:
    """Faces of the people in `rows`, each a little away from the person."""
    people = np.random.default_rng(0).normal(size=(1200, DIM))[rows]
    noise = np.random.default_rng(seed).normal(size=people.shape) / 6
    subjects = np.array([f"p{i}" for i in range(1200)])[rows]
    keys = np.array([f"{subject}/{seed}.jpg" for subject in subjects])
    metadata = {"model_id": "m1", "contract": {"image_size": 112, "colour_order": "rgb"}}
    found = EmbeddingSet((people + noise).astype(np.float32), subjects, keys=keys, metadata=metadata, **columns)
    write_embeddings(path, found)
    return str(path)


@pytest.fixture
def parts(tmp_path: Path) -> str:
    folder = tmp_path / "enrolled"
    (folder / "parts").mkdir(parents=True)
    names = [f"parts/part-{i:05d}.npz" for i in range(3)]
    for i, name in enumerate(names):
        _write(folder / name, slice(350 * i, 350 * (i + 1)), seed=1)
    write_index(folder, names)
    return str(folder)


def test_an_approximate_gallery_from_parts(tmp_path: Path, parts: str, capsys: Any) -> None:
    gallery, out = str(tmp_path / "g"), tmp_path / "r.json"
    mates = _write(tmp_path / "mates.npz", slice(0, 60), seed=2, template_ids=np.arange(60) // 2)
    strangers = _write(tmp_path / "strangers.npz", slice(1050, 1200), seed=2)

    def run(action: str, *options: str) -> str:
        assert main(["gallery", action, gallery, *options]) == 0
        return str(capsys.readouterr().out)

    assert "1050 entries of 1050 subjects, D = 16, cosine, index ivf-sq8, recall@1" in run(
        "build", "--embeddings", parts, "--index", "ivf-sq8", "--recall-probes", mates
    )
    text = run("calibrate", "--probes", strangers, "--fpir", "0.1,0.4")
    assert "FPIR 0.1" in text
    assert "not supported: 15 false alarms allowed, 30 needed" in text
    run("search", "--probes", mates, "--top", "3", "--fpir", "0.1", "--out", str(out))
    record = json.loads(out.read_text())
    for search in record["searches"]:
        assert all(c["score"] > record["threshold"] and c["fpir"] == 0.1 for c in search["candidates"])
    first = [[c["subject_id"] for c in s["candidates"][:1]] == [s["subject_id"]] for s in record["searches"]]
    assert np.mean(first) > 0.9
    run("search", "--probes", mates, "--level", "pooled", "--out", str(out))
    assert {c["fpir"] for s in json.loads(out.read_text())["searches"] for c in s["candidates"]} == {None}
    run("search", "--probes", mates, "--all", "--threshold", "0.5", "--level", "subject", "--out", str(out))
    assert any(len(search["candidates"]) > 3 for search in json.loads(out.read_text())["searches"])
    for fusion in ("best", "pooled"):
        run("search", "--probes", mates, "--templates", fusion, "--level", "pooled", "--out", str(out))
        assert [s["probe"] for s in json.loads(out.read_text())["searches"]] == [str(i) for i in range(30)]
    assert "1200 entries" in run("add", "--embeddings", strangers)
    assert "1200 entries" in run("add", "--embeddings", strangers, "--upsert")
    text = run("info")
    for part in ("150 entries outside the index", "(given)", "1050 entries then, 1200 now", "IVF"):
        assert part in text
    assert "index hnsw" in run("compact", "--index", "hnsw")
    assert "0 entries outside the index" in run("info")
    for options, message in [
        (["search", gallery, "--probes", mates, "--fpir", "0.01"], "calibrated: 0.1 (entry), 0.4 (entry)"),
        (["search", gallery, "--probes", mates, "--fpir", "0.1", "--level", "pooled"], "calibrate --level pooled"),
        (["search", gallery, "--probes", mates, "--fpir", "0.1", "--templates", "best"], "holds for single probes"),
        (["search", gallery, "--probes", mates, "--all"], "give --threshold or --fpir"),
        (["search", gallery, "--probes", strangers, "--templates", "best"], "has no template_ids"),
        (["search", gallery, "--probes", mates, "--device", "cuda:7"], "choose cpu"),
        (
            ["add", gallery, "--embeddings", strangers],
            "are enrolled already; an entry id names one entry. Replace them (--upsert)",
        ),
    ]:
        assert main(["gallery", *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["gallery", "compact", gallery, "--recall", "2"])
    assert "'2' is not a rate" in capsys.readouterr().err


@pytest.fixture(params=["lite", "server"])
def milvus(request: Any, tmp_path: Path) -> Iterator[MilvusPlace]:
    with milvus_place(request.param, tmp_path) as place:
        yield place


def test_a_gallery_on_milvus(milvus: MilvusPlace, tmp_path: Path, capsys: Any) -> None:
    enrolled, probes = (_write(tmp_path / f"{i}.npz", slice(0, 40), seed=i) for i in (1, 2))
    where = [milvus.uri, "--milvus", "--collection", milvus.collection]
    local = str(tmp_path / "g")
    for place in ([local], where):
        assert main(["gallery", "build", *place, "--embeddings", enrolled]) == 0
        assert main(["gallery", "remove", *place, "--subject", "p3"]) == 0
        out = str(tmp_path / f"{len(place)}.json")
        assert main(["gallery", "search", *place, "--probes", probes, "--out", out]) == 0
    found = [json.loads((tmp_path / name).read_text())["searches"] for name in ("1.json", "4.json")]
    assert found[0] == found[1]
    out = str(tmp_path / "where.json")
    assert (
        main(["gallery", "search", *where, "--probes", probes, "--out", out, "--where", 'subject_id like "p1%"']) == 0
    )
    searches = json.loads(Path(out).read_text())["searches"]
    assert {len(search["candidates"]) for search in searches} == {5}
    assert {c["subject_id"][:2] for search in searches for c in search["candidates"]} == {"p1"}
    capsys.readouterr()
    assert main(["gallery", "info", *where]) == 0
    assert "39 entries, D = 16" in capsys.readouterr().out
    search = ["--probes", probes, "--where", "norm > 0"]
    for options, message in [
        (["search", *where, "--probes", probes, "--where", "nrm > 0"], "refuses the filter 'nrm > 0'"),
        (["search", local, *search], "is a directory, which has none"),
        (["search", *where, *search, "--all", "--threshold", "0"], "leave --all away"),
        (["search", *where, *search, "--templates", "best"], "leave --templates away"),
        (["search", *where, *search, "--level", "pooled"], "the level pooled has none"),
        (["search", *where, "--probes", probes, "--device", "cuda:0"], "is searched by its server"),
        (["compact", *where], "Milvus compacts and lists by itself"),
        (["info", *where, "--entries"], "Milvus compacts and lists by itself"),
        (["build", *where, "--embeddings", enrolled], "exists already"),
        (["info", *where[:2], "--collection", "none"], "There is no collection none"),
        (["build", *where, "--embeddings", enrolled, "--index", "pq"], "choose from flat"),
    ]:
        assert main(["gallery", *options]) == 2
        assert message in capsys.readouterr().err


def test_the_recall_of_a_gallery_on_milvus(milvus: MilvusPlace, tmp_path: Path, parts: str, capsys: Any) -> None:
    mates = _write(tmp_path / "mates.npz", slice(0, 60), seed=2)
    where = [milvus.uri, "--milvus", "--collection", milvus.collection]
    recall = ["--recall", "0.9", "--recall-probes", mates, "--recall-sample", "50"]
    assert main(["gallery", "build", *where, "--embeddings", parts, "--index", "hnsw", *recall]) == 0
    assert "1050 entries, D = 16, cosine, index hnsw, recall@1 " in capsys.readouterr().out
    assert main(["gallery", "info", *where]) == 0
    shown = capsys.readouterr().out
    assert "of 50 probes (given)" in shown
    assert "HNSW, M 32, efConstruction 100, ef 16, 1 rescored per place" in shown


def test_search_shows_ids_with_brackets_and_long_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    keys = ["[old]g1", "[/x]", "k" * 200]
    faces = EmbeddingSet(np.eye(3, 8, dtype=np.float32), np.array(["[red]a", "[/b]", "s" * 150]), keys=np.array(keys))
    write_embeddings(tmp_path / "e.npz", faces)
    assert main(["gallery", "build", str(tmp_path / "g"), "--embeddings", str(tmp_path / "e.npz")]) == 0
    capsys.readouterr()
    assert main(["gallery", "search", str(tmp_path / "g"), "--probes", str(tmp_path / "e.npz"), "--top", "1"]) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "│" in line]
    for place, whole in ((1, keys), (3, faces.subject_ids.tolist()), (4, keys)):
        assert "".join(row[place] for row in rows) == "".join(whole)


@pytest.mark.parametrize(
    "limit", ["--threshold=nan", "--threshold=inf", "--threshold=-inf", "--threshold=x", "--fpir=nan"]
)
def test_limits_that_are_no_numbers_are_refused(tmp_path: Path, capsys: Any, limit: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gallery", "search", str(tmp_path / "g"), "--probes", "p.npz", limit])
    assert ended.value.code == 2
    option, _, value = limit.partition("=")
    assert f"argument {option}: {value!r} is not a" in capsys.readouterr().err


def test_calibrate_counts_failed_rows_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    enrolled = _write(tmp_path / "e.npz", slice(0, 20), seed=1)
    strangers = _write(tmp_path / "s.npz", slice(100, 200), seed=2, fte=np.arange(100) < 30)
    assert main(["gallery", "build", str(tmp_path / "g"), "--embeddings", enrolled]) == 0
    assert main(["gallery", "calibrate", str(tmp_path / "g"), "--probes", strangers, "--fpir", "0.1"]) == 0
    assert "(100 strangers, entry); not supported: 10 false alarms allowed, 30 needed" in capsys.readouterr().out
    assert "30 rows failed to enrol; they count" in caplog.text
    assert main(["gallery", "calibrate", str(tmp_path / "g"), "--probes", strangers, "--fpir", "0.8"]) == 2
    assert "Ask for a lower rate" in capsys.readouterr().err


def test_a_place_that_takes_no_gallery_is_told(tmp_path: Path, parts: str, capsys: Any) -> None:
    file = tmp_path / "file"
    file.touch()
    faces = _write(tmp_path / "faces.npz", slice(0, 40), seed=2)
    assert main(["gallery", "build", str(tmp_path / "g"), "--embeddings", faces]) == 0
    for arguments, message in [
        (["build", str(file), "--embeddings", faces], f"{file}: File exists. Something else stands there"),
        (["build", str(file / "g"), "--embeddings", faces], f"{file / 'g'}: Not a directory. A file stands where"),
    ]:
        assert main(["gallery", *arguments]) == 2
        assert message in capsys.readouterr().err
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limit[1]))  # the vectors fit, the index beside them does not
    try:
        assert main(["gallery", "build", str(tmp_path / "i"), "--embeddings", parts, "--index", "hnsw"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "index-00000001.faiss: File too large. Make room" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "i").iterdir()] == [".lock"]


def test_names_that_are_no_unicode_keep_their_bytes(tmp_path: Path) -> None:
    names = [b"J\xf6rg", b"\xff\xfe", "J\u00f6rg".encode()]
    subjects = np.array([os.fsdecode(name) for name in names])
    keys = np.array([os.fsdecode(name + b"/1.jpg") for name in names])
    faces = EmbeddingSet(np.eye(3, DIM, dtype=np.float32), subjects, keys=keys)
    write_embeddings(tmp_path / "e.npz", faces)
    gallery, found = str(tmp_path / "g"), tmp_path / "r.json"
    search = ["search", gallery, "--probes", str(tmp_path / "e.npz"), "--top", "1"]

    def run(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "launch", *arguments]
        strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "120"}
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=strict).stdout

    run("gallery", "build", gallery, "--embeddings", str(tmp_path / "e.npz"))
    printed = [run("gallery", "info", gallery, "--entries"), run("gallery", *search, "--out", str(found))]
    assert all(name + b"/1.jpg" in text for text in printed for name in names)
    searches = json.loads(found.read_text())["searches"]
    assert [os.fsencode(s["candidates"][0]["subject_id"]) for s in searches] == names
    protocol = ["evaluate", "identification", "--out", str(tmp_path / "i.json")]
    for side in ("--gallery", "--probes"):
        protocol += [side, str(tmp_path / "e.npz")]
    run(*protocol, "--save-candidates", str(tmp_path / "c.csv"))
    lines = (tmp_path / "c.csv").read_bytes().splitlines()[1:]
    assert [line.split(b",")[4] for line in lines if line.split(b",")[1] == b"1"] == names
    run("report", str(tmp_path / "i.json"), "--out", str(tmp_path / "report"))
    run("gallery", "remove", gallery, "--entry", keys[0])
    assert Gallery.open(tmp_path / "g").entries.entry_ids.tolist() == keys[1:].tolist()


def test_an_input_contract_in_another_form_is_told(tmp_path: Path, capsys: Any) -> None:
    faces = EmbeddingSet(np.eye(3, DIM, dtype=np.float32), np.arange(3), metadata={"contract": {"x": 1}})
    write_embeddings(tmp_path / "e.npz", faces)
    assert main(["gallery", "build", str(tmp_path / "g"), "--embeddings", str(tmp_path / "e.npz")]) == 2
    assert "e.npz: metadata, contract.image_size: Field required" in capsys.readouterr().err
