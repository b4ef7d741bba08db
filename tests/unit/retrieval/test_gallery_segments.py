"""Segments: what a change writes, and what it leaves alone."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import Gallery, segments
from retrieval.gallery.segments import Rows

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 16)


def _vectors(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def _files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir() if path.suffix in (".npy", ".npz")}


def _rows(gallery: Gallery) -> list[int]:
    return [segment.rows for segment in gallery.manifest.segments]


def test_one_by_one_makes_few_segments(tmp_path: Path) -> None:
    vectors = _vectors(38)
    gallery = Gallery.build(tmp_path / "g", vectors[:1], [0])
    written = 0
    for row in range(1, 38):
        before = _files(tmp_path / "g")
        gallery = gallery.add(vectors[row : row + 1], [row])
        new = {name for name, inode in _files(tmp_path / "g").items() if before.get(name) != inode}
        written += sum(s.rows for s in gallery.manifest.segments if s.embeddings.name in new)
        assert len(_rows(gallery)) <= row / 16 + 5
    assert written <= 38 * 5  # rows written in all: each one at most log2(16) + 1 times
    whole = Gallery.build(tmp_path / "w", vectors, np.arange(38))
    assert _rows(whole) == [16, 16, 6]
    np.testing.assert_array_equal(gallery.embeddings, whole.embeddings)
    np.testing.assert_array_equal(gallery.entries.entry_ids, whole.entries.entry_ids)
    assert gallery.compact().search(vectors, top=9) == whole.search(vectors, top=9) == gallery.search(vectors, top=9)
    assert _rows(gallery.compact()) == [16, 16, 6]


def test_an_addition_leaves_full_segments_alone(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", _vectors(64), np.arange(64))
    before = _files(tmp_path / "g")
    gallery.add(_vectors(3, seed=1), [1, 2, 3])
    assert before.items() < _files(tmp_path / "g").items()


def test_what_is_removed_leaves_the_disk_at_once(tmp_path: Path) -> None:
    vectors = _vectors(64)
    vectors[37] = np.arange(1, 9)
    gallery = Gallery.build(tmp_path / "g", vectors, [f"person{row}" for row in range(64)])
    before = _files(tmp_path / "g")
    code = gallery.embeddings[37].tobytes()
    smaller = gallery.remove(entry_ids=["37"])
    after = _files(tmp_path / "g")
    assert len(before.keys() & after.keys()) == 6  # three segments of four are as they were
    assert _rows(smaller) == [16, 16, 15, 16]
    data = [path.read_bytes() for path in (tmp_path / "g").iterdir()]
    assert not any(code in content or "person37".encode("utf-32-le") in content for content in data)
    assert smaller.manifest.num_subjects == 63
    emptied = smaller.remove(subject_ids=[f"person{row}" for row in range(16)])
    assert _rows(emptied) == [16, 15, 16]


def test_subjects_are_counted_through_all_changes(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    gallery = Gallery.build(tmp_path / "g", _vectors(20), random.integers(0, 9, 20))
    for step in range(12):
        count = int(random.integers(1, 6))
        ids = random.integers(0, 60, count)
        match step % 3:
            case 0:
                gallery = gallery.add(_vectors(count, step), random.integers(0, 15, count))
            case 1:
                gallery = gallery.remove(entry_ids=set(random.choice(gallery.entries.entry_ids, 3).tolist()))
            case 2:
                names = np.unique(ids)
                gallery = gallery.add(_vectors(len(names), step), names % 15, names, upsert=True)
        assert gallery.manifest.num_subjects == len(np.unique(gallery.entries.subject_ids))
        assert gallery.manifest.count == len(gallery.entries) == len(np.unique(gallery.entries.entry_ids))
        assert (np.diff(gallery.entries.numbers) > 0).all()


def test_streamed_sets_equal_one_build(tmp_path: Path) -> None:
    vectors, failed = _vectors(50), np.arange(50) % 7 == 3
    vectors[failed] = 0
    keys = np.array([f"k{row}" for row in range(50)])
    whole_set = EmbeddingSet(vectors, np.arange(50), keys=keys)
    parts = (whole_set.take(np.arange(50)[start : start + 11]) for start in range(0, 50, 11))
    streamed = Gallery.build_from(tmp_path / "s", parts)
    whole = Gallery.build(tmp_path / "w", vectors[~failed], np.arange(50)[~failed], keys[~failed])
    np.testing.assert_array_equal(streamed.embeddings, whole.embeddings)
    np.testing.assert_array_equal(streamed.entries.entry_ids, whole.entries.entry_ids)
    twice = [whole_set.take(np.arange(2))] * 2
    with pytest.raises(DataError, match="Entry ids k0, k1 occur more than once"):
        Gallery.build_from(tmp_path / "t", twice)
    assert [path.name for path in (tmp_path / "t").iterdir()] == [".lock"]
    with pytest.raises(DataError, match="give at least one"):
        Gallery.build_from(tmp_path / "u", [])


@pytest.mark.parametrize("entry", ["one array", "one set", "a set with failures"])
def test_building_copies_segments_and_never_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 512)
    vectors = np.random.default_rng(0).standard_normal((12_000, 512), np.float32)
    if entry == "a set with failures":
        vectors[::1000] = 0
    one_set = EmbeddingSet(vectors, np.arange(12_000))
    Gallery.build(tmp_path / "first", vectors[1:2], [0])  # imports what it needs
    tracemalloc.start()
    if entry == "one array":
        Gallery.build(tmp_path / "g", vectors, np.arange(12_000))
    else:
        Gallery.build_from(tmp_path / "g", [one_set])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * vectors.nbytes


@pytest.mark.parametrize("verify", [True, False])
def test_an_opened_gallery_maps_its_vectors_and_holds_its_ids_once(tmp_path: Path, verify: bool) -> None:
    vectors = np.random.default_rng(0).standard_normal((800, 2048), np.float32)
    names = np.array([f"{row:0400d}" for row in range(800)])
    Gallery.build(tmp_path / "g", vectors, names, names).search(vectors[0], top=1)  # imports what it needs
    tracemalloc.start()
    gallery = Gallery.open(tmp_path / "g", verify=verify)
    _, peak = tracemalloc.get_traced_memory()
    rows = gallery._rows
    gallery.search(vectors[0], top=1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ids = 2 * names.nbytes
    assert len(rows.parts) == 50
    assert all(isinstance(part.base, np.memmap) for part in rows.parts)
    assert peak < ids + 0.3 * vectors.nbytes
    assert held < 1.5 * ids + 0.1 * vectors.nbytes
    np.testing.assert_array_equal([len(part.entries) for part in gallery._segments], 16)


def test_damage_is_not_copied_into_a_new_segment(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", _vectors(6), np.arange(6))
    path = next((tmp_path / "g").glob("embeddings-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for change in (lambda: gallery.remove(entry_ids=["2"]), lambda: gallery.add(_vectors(8), np.arange(8))):
        with pytest.raises(DataError, match="is damaged"):
            change()
    assert Gallery.open(tmp_path / "g", verify=False).manifest == gallery.manifest


def test_rows_of_several_parts() -> None:
    whole = _vectors(23)
    rows = Rows([whole[:5], whole[5:6], whole[6:20], whole[20:]], 8)
    wanted = np.array([[22, 0, 5], [5, 19, 6]])
    np.testing.assert_array_equal(rows.take(wanted), whole[wanted])
    for start in (0, 5, 6, 12, 23):
        np.testing.assert_array_equal(rows.from_row(start).whole, whole[start:])
    assert [len(block) for block in rows.blocks(4)] == [4, 1, 1, 4, 4, 4, 2, 3]
