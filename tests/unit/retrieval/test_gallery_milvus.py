"""Galleries on Milvus: kinds and their effort, recall, filters, building; on Milvus Lite and on a server."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aroface.contract import InputContract
from aroface.errors import ConfigError, DataError, ShapeError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import IndexWish, MilvusGallery, milvus_connection, milvus_source
from retrieval.gallery.milvus_kinds import Effort, efforts_of, index_of
from tests.helpers.drawn_vectors import drawn, exact_cosines
from tests.helpers.milvus_places import MilvusPlace, milvus_place

Array = np.ndarray[Any, Any]
RGB, BGR = (InputContract(image_size=112, colour_order=order) for order in ("rgb", "bgr"))
DIM = 16


@pytest.fixture(params=["lite", "server"])
def milvus(request: Any, tmp_path: Path) -> Iterator[MilvusPlace]:
    with milvus_place(request.param, tmp_path) as place:
        yield place


def _build(place: MilvusPlace, *args: Any, suffix: str = "", **more: Any) -> MilvusGallery:
    return MilvusGallery.build(place.uri, *args, collection=place.collection + suffix, **more)


def _open(place: MilvusPlace, **more: Any) -> MilvusGallery:
    return MilvusGallery.open(place.uri, collection=place.collection, **more)


@pytest.mark.parametrize("rows", [4, 500, 20_000, 116_458, 10**9])
@pytest.mark.parametrize("dimension", [16, 100, 511, 512])
def test_lists_follow_the_rows_of_a_segment(rows: int, dimension: int) -> None:
    """Milvus advises 4 sqrt(n); Faiss wants 39 rows for each centre, 8 bits a code."""
    in_segment = min(rows, {16: 204_437, 100: 181_250, 511: 116_560, 512: 116_458}[dimension])
    for kind in ("ivf", "ivf-sq8", "ivf-pq"):
        _, params = index_of(kind, dimension, rows)
        lists = params["nlist"]
        assert lists & (lists - 1) == 0
        assert lists == 1 or 39 * lists <= in_segment
        near = lists >= 2.8 * np.sqrt(in_segment)
        assert near or 2 * lists * 39 > in_segment
        assert lists <= 5.7 * np.sqrt(in_segment)
        if rows == 10**9:
            assert index_of(kind, dimension)[1] == params
        if kind == "ivf-pq":
            assert dimension % params["m"] == 0
            assert params["m"] >= dimension // 8
            assert params["nbits"] == 8
    assert index_of("ivf-pq", 512)[1] == {"nlist": 1024, "m": 64, "nbits": 8}


def test_efforts_ask_for_enough_and_for_what_milvus_takes() -> None:
    for kind in ("ivf", "ivf-sq8", "ivf-pq", "hnsw"):
        efforts = efforts_of(kind, index_of(kind, 512)[1])
        assert len(set(efforts)) == len(efforts)
        for visits, rescored in efforts:
            effort = Effort(kind, visits, rescored)
            for top in (1, 10, 100):
                count = effort.first_list(top)
                assert count >= max(top + 16, rescored * top)
                (value,) = effort.search_params(count)["params"].values()
                assert value >= (max(visits, count) if kind == "hnsw" else visits)
    assert Effort("ivf", 0, 1).search_params(20) == {}
    assert Effort("ivf", 8, 1).among(25, 1000).visits == 320
    assert Effort("ivf", 8, 1).among(1, 10**9).visits == 1 << 15
    assert Effort("ivf", 8, 1).among(0, 1000) == Effort("ivf", 8, 1)


def _people(count: int, seed: int) -> Array:
    """(count, D) images of 200 people."""
    generator = np.random.default_rng(seed)
    people = np.random.default_rng(0).normal(size=(200, DIM))
    return (people[np.arange(count) % 200] + generator.normal(size=(count, DIM)) / 2).astype(np.float32)


@pytest.mark.parametrize("kind", ["ivf", "ivf-sq8", "ivf-pq", "hnsw"])
def test_recall_is_measured_and_reached(milvus: MilvusPlace, kind: Any, tmp_path: Path) -> None:
    if milvus.is_lite and kind == "ivf-pq":
        pytest.skip("not in Milvus Lite")
    enrolled, probes = _people(3000, seed=1), _people(300, seed=2)
    wish = IndexWish(kind, recall=0.9, sample=150, probes=probes)
    gallery = _build(milvus, enrolled, np.arange(3000) % 200, index=wish)
    recall = gallery.info.recall
    assert recall is not None
    assert (recall.probes, recall.source) == (150, "given")
    assert recall.at_1 >= 0.9
    gallery.close()
    gallery = _open(milvus)
    assert gallery.info.recall == recall
    chosen = np.sort(np.random.default_rng(1).permutation(300)[:150])
    shares = []
    for row, near in zip(chosen, gallery.search(probes[chosen], top=10), strict=True):
        exact = np.sort(exact_cosines(enrolled, probes[row]))[::-1]
        shares.append((near[0].score >= exact[0], np.mean([c.score >= exact[9] for c in near])))
    assert np.mean(shares, axis=0).tolist() == pytest.approx([recall.at_1, recall.at_10], abs=1e-9)
    first = "ef 16" if kind == "hnsw" else "nprobe 4"
    assert first in gallery.info.how
    gallery.close()
    harder = IndexWish(kind, recall=1.1, sample=50, probes=probes)
    tried = _build(milvus, enrolled, np.arange(3000) % 200, index=harder, replace=True)
    assert tried.info.recall is not None
    assert tried.info.recall.at_1 >= recall.at_1 - 0.02
    tried.close()


def test_the_search_visits_as_much_as_is_kept(milvus: MilvusPlace) -> None:
    """Points without structure: visiting few clusters finds few."""
    enrolled = drawn(4000)
    wish = IndexWish("ivf", recall=0.1, sample=200, probes=drawn(200, seed=4))
    few = _build(milvus, enrolled, np.arange(4000), index=wish)
    many = _build(milvus, enrolled, np.arange(4000), suffix="_m", index=IndexWish("ivf", 1.0, 200, drawn(200, seed=4)))
    assert few.info.recall is not None
    assert many.info.recall is not None
    assert few.info.recall.at_1 < 0.97 < many.info.recall.at_1
    one = few.search_where(drawn(50, seed=5), 'subject_id in ["7", "8"]', top=2)
    assert all({c.subject_id for c in found} == {"7", "8"} for found in one)  # more is visited where few match
    few.close()
    many.close()


def test_drawn_probes_come_from_the_first_part(milvus: MilvusPlace, caplog: pytest.LogCaptureFixture) -> None:
    sets = [EmbeddingSet(_people(n, seed=n), np.arange(n), keys=_keys(n)) for n in (1500, 1501)]
    wish = IndexWish("hnsw", recall=1.1, sample=60)
    with caplog.at_level(logging.WARNING):
        gallery = MilvusGallery.build_from(milvus.uri, iter(sets), collection=milvus.collection, index=wish)
    assert "Index hnsw: recall@1 is" in caplog.text
    recall = gallery.info.recall
    assert recall is not None
    assert recall.probes == 60
    assert recall.source == "enrolled entries of the first part turned to cosine 0.4"
    gallery.close()


def _keys(count: int) -> Array:
    return np.array([f"{count}/{i}" for i in range(count)])


def test_kinds_that_a_server_does_not_have_are_refused(milvus: MilvusPlace) -> None:
    with pytest.raises(ConfigError, match="index pq is not offered on Milvus; choose from flat, ivf, ivf-sq8,"):
        _build(milvus, drawn(4), list("abcd"), index="pq")
    if milvus.is_lite:
        with pytest.raises(ConfigError, match=r"ivf-pq is not offered by Milvus Lite.*Use a server.*or choose from"):
            _build(milvus, drawn(4), list("abcd"), index="ivf-pq")
    with pytest.raises(DataError, match="have 8 dimensions"):
        _build(milvus, drawn(40), np.arange(40), index=IndexWish("hnsw", probes=drawn(4)[:, :8]))
    with pytest.raises(DataError, match="There is no collection"):
        _open(milvus)


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [
        ("v2.2.16", False),
        ("2.3.0", True),
        ("v2.3.5-lite", True),
        ("milvus_lite-2.0", True),
        ("v3.0-rc1", True),
        ("?", True),
    ],
)
def test_servers_that_are_too_old_are_told(monkeypatch: pytest.MonkeyPatch, version: str, is_taken: int) -> None:
    pymilvus = pytest.importorskip("pymilvus")

    class Client:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.is_open = True

        def get_server_version(self) -> str:
            return version

        def close(self) -> None:
            self.is_open = False

    monkeypatch.setattr(pymilvus, "MilvusClient", Client)
    if is_taken:
        assert milvus_connection.connect("http://somewhere:19530", "").is_open
    else:
        with pytest.raises(ConfigError, match=r"somewhere:19530 is v2\.2\.16; 2\.3 or newer is needed"):
            milvus_connection.connect("http://somewhere:19530", "")


def test_long_answers_are_fetched_in_pieces(milvus: MilvusPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    enrolled, probes = drawn(60), drawn(9, seed=1)
    gallery = _build(milvus, enrolled, np.arange(60))
    whole = gallery.search(probes, top=20)
    asked: list[int] = []
    search = gallery._client.search

    def counted(*args: Any, **more: Any) -> Any:
        asked.append(len(more["data"]))
        return search(*args, **more)

    monkeypatch.setattr(gallery._client, "search", counted)
    monkeypatch.setattr(milvus_source, "_ANSWER_BYTES", 4 * DIM * 36 * 2)
    assert gallery.search(probes, top=20) == whole
    assert asked == [2, 2, 2, 2, 1]
    gallery.close()


def test_one_search_counts_the_entries_once(milvus: MilvusPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = _build(milvus, drawn(30), np.arange(30), model_id="m1")
    counts: list[str] = []
    query = gallery._client.query
    monkeypatch.setattr(
        gallery._client, "query", lambda *args, **more: counts.append(more["filter"]) or query(*args, **more)
    )
    found = gallery.search(drawn(2, seed=1), top=3, model_id="m1")
    assert [gallery.fpir_of(c.score, "entry") for near in found for c in near] == [None] * 6
    assert counts == [""]
    gallery.close()


def test_a_collection_is_replaced_by_a_whole_one_only(milvus: MilvusPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _build(milvus, drawn(4), list("abcd"))
    first.close()
    refusals: list[tuple[Any, str]] = [
        (["q", "q"], "occur more than once"),
        (["q", "x" * 513], "longer than 512 bytes"),
        (["q", "\udcff.jpg"], "Rename the file and embed again"),
        (["q"], "one for each is needed"),
    ]
    for names, message in refusals:
        with pytest.raises((DataError, ShapeError), match=message):
            _build(milvus, drawn(2), ["e", "f"], names, replace=True)

    def fail(*_: Any) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(MilvusGallery, "add", fail)
        with pytest.raises(ConnectionError):
            _build(milvus, drawn(2), ["e", "f"], replace=True)
    left = _open(milvus)
    assert {c.subject_id for c in left.search(drawn(1), top=9)[0]} == set("abcd")
    left.close()
    new = _build(milvus, drawn(2)[:, :8], ["e", "f"], replace=True)
    assert {c.subject_id for c in new.search(drawn(1)[:, :8], top=9)[0]} == {"e", "f"}
    assert [name for name in new._client.list_collections() if name.startswith(milvus.collection)] == [
        milvus.collection
    ]
    new.close()


@pytest.mark.parametrize("index", ["ivf", "ivf-sq8", "hnsw"])
def test_milvus_kinds_filters_and_what_is_kept(milvus: MilvusPlace, index: Any) -> None:
    enrolled, subjects = drawn(300), [f"dept-{row % 3}/{row}" for row in range(300)]
    gallery = _build(milvus, enrolled, subjects, index=index, consistency="Bounded", model_id="m1")
    gallery.calibrate(EmbeddingSet(drawn(100, seed=8), np.arange(1000, 1100)), [0.1])
    thresholds = gallery.info.calibration
    gallery.close()
    gallery = _open(milvus, consistency="Session")
    assert (gallery.info.index, gallery.info.model_id, gallery.info.calibration) == (index, "m1", thresholds)
    assert [point.non_mated for point in thresholds] == [100]
    probes = enrolled[:20] + drawn(20, seed=3) / 4
    own = [row for row in range(300) if row % 3 == 1]
    for row, (anyone, there) in enumerate(
        zip(
            gallery.search(probes, top=1),
            gallery.search_where(probes, 'subject_id like "dept-1/%"', top=3),
            strict=True,
        )
    ):
        scores = exact_cosines(enrolled, probes[row])
        assert (anyone[0].entry_id, anyone[0].score) == (str(row), scores[row])
        assert all(int(c.entry_id) in own and c.score == scores[int(c.entry_id)] for c in there)
        assert len(there) == 3
        assert row % 3 != 1 or there[0].entry_id == str(row)
    with pytest.raises(ConfigError, match="the level pooled has none"):
        gallery.search_where(probes, "", top=1, level="pooled")
    gallery.close()


def test_milvus_filters_are_checked_as_other_searches_are(milvus: MilvusPlace) -> None:
    gallery = _build(milvus, drawn(30), np.arange(30) // 3, model_id="m1", contract=RGB)
    probes = drawn(2, seed=1)
    assert gallery.search_where(probes, 'subject_id == "nobody"', top=3) == [[], []]
    assert gallery.search_where(probes, "", top=3) == gallery.search(probes, top=3)
    anyone = gallery.search(probes[0], top=30)[0]
    low = anyone[9].score
    above = gallery.search_where(probes[0], "norm > 0", top=30, threshold=low, model_id="m1", contract=RGB)[0]
    assert above == anyone[: len(above)]
    assert len(above) == 9
    best = gallery.search_where(probes, 'subject_id in ["1", "2"]', top=9, level="subject")
    assert [sorted(c.subject_id for c in found) for found in best] == [["1", "2"], ["1", "2"]]
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"top": 0}, "at least 1 entry"),
        ({"model_id": "m2"}, "model m1; these are of m2"),
        ({"contract": BGR}, "embed both with the same one"),
    ]
    for options, message in refusals:
        with pytest.raises(DataError, match=message):
            gallery.search_where(probes, "norm > 0", **{"top": 1, **options})
    for wrong in ('subject_id lke "x"', "nobody == 1", "norm >"):
        with pytest.raises(ConfigError, match="refuses the filter.*an example: subject_id like") as caught:
            gallery.search_where(probes, wrong, top=1)
        assert wrong in str(caught.value)
    gallery.remove(subject_ids=[str(i) for i in range(10)])
    with pytest.raises(DataError, match="is empty; enrol someone"):
        gallery.search_where(probes, "norm > 0", top=1)
    gallery.close()


def test_a_collection_is_built_part_by_part(milvus: MilvusPlace) -> None:
    vectors = drawn(30)
    fte = np.arange(30) == 4
    sets = [
        EmbeddingSet(vectors[part], np.arange(30)[part], fte=fte[part])
        for part in (slice(0, 10), slice(10, 12), slice(12, 30))
    ]
    seen: list[int] = []

    def one_by_one() -> Iterator[EmbeddingSet]:
        for number, one in enumerate(sets):
            seen.append(number)
            yield one

    gallery = MilvusGallery.build_from(milvus.uri, one_by_one(), collection=milvus.collection, model_id="m1")
    assert seen == [0, 1, 2]
    whole = _build(milvus, vectors[~fte], np.arange(30)[~fte], suffix="_whole")
    probes = drawn(3, seed=2)
    assert gallery.search(probes, top=29) == whole.search(probes, top=29)
    assert (len(gallery), gallery.info.model_id) == (29, "m1")

    twice = f"{milvus.collection}_twice"
    again = [EmbeddingSet(vectors[:3], np.arange(3), keys=np.array(["a", "b", "c"]))] * 2
    with pytest.raises(DataError, match="Entry ids a, b, c are enrolled already"):
        MilvusGallery.build_from(milvus.uri, iter(again), collection=twice)
    with pytest.raises(DataError, match=f"There is no collection {twice}"):
        MilvusGallery.open(milvus.uri, collection=twice)
    with pytest.raises(DataError, match="no embedding to enrol"):
        MilvusGallery.build_from(milvus.uri, iter([]), collection=twice)
    gallery.close()
    whole.close()


def test_looking_for_a_gallery_makes_no_file(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    with pytest.raises(DataError, match=r"There is no collection faces at .*m\.db"):
        MilvusGallery.open(str(tmp_path / "m.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_milvus_lite_is_told_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("milvus_lite")
    (tmp_path / "m.db").write_text("no database")
    with pytest.raises(ConfigError, match=r"cannot open .*m\.db.*damaged"):
        MilvusGallery.open(str(tmp_path / "m.db"))
    assert not caplog.records


def test_milvus_leaves_the_handlers_of_others_open(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    program = """
import logging, sys
from retrieval.gallery.milvus_connection import connect
handler = logging.StreamHandler(open(sys.argv[1], "w"))
handler.close = lambda: handler.stream.close()
logging.getLogger().addHandler(handler)
connect(sys.argv[2], "").close()
logging.getLogger().warning("still here")
"""
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", program, str(log), str(tmp_path / "m.db")], capture_output=True, timeout=60)
    assert "still here" in log.read_text()
