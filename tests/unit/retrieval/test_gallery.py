"""The gallery against brute force in NumPy, and against everything that must be refused."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aroface.contract import InputContract
from aroface.errors import DataError, ShapeError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import Gallery, segments
from retrieval.gallery.store import read_manifest, write_lock
from tests.helpers.drawn_vectors import drawn, exact_cosines

RGB = InputContract(image_size=112, colour_order="rgb")
BGR = InputContract(image_size=112, colour_order="bgr")


def _brute_force(gallery: np.ndarray[Any, Any], probe: np.ndarray[Any, Any], top: int) -> list[tuple[int, float]]:
    rows = exact_cosines(gallery, probe).tolist()
    order = sorted(range(len(rows)), key=lambda row: (-rows[row], row))[:top]
    return [(row, rows[row]) for row in order]


@pytest.mark.parametrize("top", [1, 3, 50, 400])
def test_search_equals_brute_force_with_ties(tmp_path: Path, top: int) -> None:
    enrolled = np.tile(drawn(75), (4, 1))  # every vector four times: whole lists of ties
    gallery = Gallery.build(tmp_path / "g", enrolled, np.arange(300) % 30)
    probes = np.concatenate([enrolled[:5] * 3, drawn(25, seed=1)])
    for probe, found in zip(probes, gallery.search(probes, top=top), strict=True):
        expected = _brute_force(enrolled, probe, top)
        assert [(int(c.entry_id), c.score) for c in found] == expected
        assert [c.rank for c in found] == list(range(1, min(top, 300) + 1))
        assert all(int(c.subject_id) == int(c.entry_id) % 30 for c in found)


def test_a_tie_longer_than_the_list_is_cut_by_enrolment(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", np.ones((500, 8), np.float32), ["same"] * 500)
    assert [c.entry_id for c in gallery.search(np.ones(8), top=5)[0]] == ["0", "1", "2", "3", "4"]


def test_batch_and_single_agree(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", drawn(500), np.arange(500))
    probes = drawn(40, seed=3)
    assert gallery.search(probes, top=7) == [gallery.search(probe, top=7)[0] for probe in probes]


def test_subject_level_takes_the_best_entry_of_each(tmp_path: Path) -> None:
    enrolled, subjects = drawn(200), np.array([f"p{i % 9}" for i in range(200)])
    gallery = Gallery.build(tmp_path / "g", enrolled, subjects)
    for probe in drawn(10, seed=4):
        found = gallery.search(probe, top=9, level="subject")[0]
        best: dict[str, float] = {}
        for row, score in _brute_force(enrolled, probe, 200):
            best.setdefault(str(subjects[row]), score)
        assert [(c.subject_id, c.score) for c in found] == list(best.items())
        assert gallery.search(probe, top=2, level="subject")[0] == found[:2]


def test_add_and_remove_equal_a_gallery_built_at_once(tmp_path: Path) -> None:
    vectors, subjects = drawn(60), [f"s{i % 7}" for i in range(60)]
    names = [f"e{i}" for i in range(60)]
    grown = Gallery.build(tmp_path / "a", vectors[:20], subjects[:20], names[:20])
    grown = grown.add(vectors[20:], subjects[20:], names[20:])
    whole = Gallery.build(tmp_path / "b", vectors, subjects, names)
    np.testing.assert_array_equal(grown.embeddings, whole.embeddings)
    assert grown.entries.entry_ids.tolist() == whole.entries.entry_ids.tolist() == names
    np.testing.assert_allclose(grown.entries.norms, np.linalg.norm(vectors, axis=1), rtol=1e-6)

    smaller = grown.remove(subject_ids=["s0"], entry_ids=["e1"])
    left = [i for i in range(60) if i % 7 and i != 1]
    assert smaller.entries.entry_ids.tolist() == [names[i] for i in left]
    np.testing.assert_array_equal(smaller.embeddings, whole.embeddings[left])
    assert len(list((tmp_path / "a").glob("embeddings-*"))) == 1
    assert len(grown) == 60  # an opened gallery keeps its state
    assert grown.search(vectors[1], top=1)[0][0].entry_id == "e1"


def test_numbers_given_as_ids_are_never_taken_twice(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", drawn(3), [1, 2, 3]).remove(entry_ids=["0"]).add(drawn(2), [4, 5])
    assert gallery.entries.entry_ids.tolist() == ["1", "2", "3", "4"]


def test_a_gallery_emptied_is_refused_at_search_and_can_be_filled(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", drawn(2), ["a", "b"]).remove(subject_ids=["a", "b"])
    with pytest.raises(DataError, match="is empty; enrol someone"):
        gallery.search(drawn(1), top=1)
    assert gallery.add(drawn(1), ["c"]).search(drawn(1), top=5)[0][0].subject_id == "c"


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_vectors_without_direction_are_named(tmp_path: Path, value: float) -> None:
    vectors = drawn(9)
    vectors[[3, 7]] = value
    with pytest.raises(DataError, match="Rows 3, 7 of the embeddings have no direction"):
        Gallery.build(tmp_path / "g", vectors, np.arange(9))
    assert not (tmp_path / "g").exists()


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give at least one"):
        Gallery.build(tmp_path / "e", np.zeros((0, 4), np.float32), [])
    gallery = Gallery.build(tmp_path / "g", drawn(4), list("abcd"), list("wxyz"), model_id="m1", contract=RGB)
    with pytest.raises(DataError, match="have 8 dimensions, the gallery has 16"):
        gallery.search(drawn(1, 8), top=1)
    with pytest.raises(DataError, match="have 8 dimensions, the gallery has 16"):
        gallery.add(drawn(1, 8), ["e"])
    with pytest.raises(DataError, match="Entry ids z are enrolled already"):
        gallery.add(drawn(1), ["e"], ["z"])
    with pytest.raises(DataError, match="Entry ids q occur more than once"):
        gallery.add(drawn(2), ["e", "f"], ["q", "q"])
    with pytest.raises(DataError, match="model m1; these are of m2"):
        gallery.search(drawn(1), top=1, model_id="m2")
    with pytest.raises(DataError, match="of input contract"):
        gallery.add(drawn(1), ["e"], ["q"], contract=BGR)
    with pytest.raises(DataError, match="has no subject nobody"):
        gallery.remove(subject_ids=["a", "nobody"])
    with pytest.raises(DataError, match="at least 1 entry"):
        gallery.search(drawn(1), top=0)
    with pytest.raises(ShapeError, match="one for each is needed"):
        gallery.add(drawn(2), ["e"])
    with pytest.raises(ShapeError, match="float"):
        gallery.search(np.ones((1, 16), np.int64), top=1)
    with pytest.raises(DataError, match="exists already"):
        Gallery.build(tmp_path / "g", drawn(1), ["a"])
    assert Gallery.open(tmp_path / "g").manifest == gallery.manifest


def test_replace_takes_the_place_of_a_gallery(tmp_path: Path) -> None:
    Gallery.build(tmp_path / "g", drawn(4), list("abcd"), model_id="m1")
    gallery = Gallery.build(tmp_path / "g", drawn(2, 8), list("xy"), model_id="m2", replace=True)
    assert (len(gallery), gallery.manifest.dimension, gallery.manifest.model_id) == (2, 8, "m2")
    assert gallery.manifest.generation == 2


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(DataError, match=r"holds other files \(thesis.tex\)"):
        Gallery.build(tmp_path, drawn(1), ["a"])


@pytest.mark.parametrize("pattern", ["embeddings-*", "entries-*"])
def test_a_flipped_byte_is_found(tmp_path: Path, pattern: str) -> None:
    Gallery.build(tmp_path / "g", drawn(50), np.arange(50))
    path = next((tmp_path / "g").glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        Gallery.open(tmp_path / "g")


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", drawn(50), np.arange(50), model_id="m1", contract=RGB)
    strangers = EmbeddingSet(drawn(40, seed=1), np.arange(100, 140))
    gallery = gallery.calibrate(strangers, [0.1])
    path = tmp_path / "g" / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="uild (it|the gallery) again with `aroface gallery build --replace`"):
            read_manifest(tmp_path / "g")
    path.write_bytes(data)
    assert Gallery.open(tmp_path / "g").manifest == gallery.manifest


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[1]", b'{"format_version": 2}', b'{"format_version": 3}'])
def test_a_gallery_with_a_damaged_manifest_is_replaced_when_the_new_one_is_whole(
    tmp_path: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 1)  # so that files are written before the failure
    first = Gallery.build(tmp_path / "g", drawn(9), np.arange(9)).add(drawn(1, seed=1), ["new"])
    manifest = tmp_path / "g" / "manifest.json"
    manifest.write_bytes(damage)
    before = {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()}
    with pytest.raises(DataError, match="exists already"):
        Gallery.build(tmp_path / "g", drawn(2), ["a", "b"])

    def parts() -> Iterator[EmbeddingSet]:
        yield EmbeddingSet(drawn(2), np.arange(2))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Gallery.build_from(tmp_path / "g", parts(), replace=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()} == before
    new = Gallery.build(tmp_path / "g", drawn(2), ["a", "b"], replace=True)
    assert new.manifest.generation == first.manifest.generation + 1
    assert {path.name for path in (tmp_path / "g").iterdir()} == new.manifest.file_names | {"manifest.json", ".lock"}


@pytest.mark.parametrize("beside", ["shard-000000.tar", None])
def test_a_manifest_of_something_else_is_not_replaced(tmp_path: Path, beside: str | None) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 1}')
    if beside:
        (tmp_path / beside).touch()
    with pytest.raises(DataError, match=f"{beside or 'no data of one'}.* Name another directory"):
        Gallery.build(tmp_path, drawn(2), ["a", "b"], replace=True)
    assert (tmp_path / "manifest.json").read_text() == '{"format_version": 1}'


def test_missing_files_and_other_formats_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make one with `aroface gallery build`"):
        Gallery.open(tmp_path)
    gallery = Gallery.build(tmp_path / "g", drawn(2), ["a", "b"])
    manifest = tmp_path / "g" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 3', '"format_version": 99'))
    with pytest.raises(DataError, match="format_version 99; this aroface reads 3"):
        Gallery.open(tmp_path / "g")
    manifest.write_text(text)
    (tmp_path / "g" / gallery.manifest.segments[0].embeddings.name).unlink()
    with pytest.raises(DataError, match=r"is missing\. Restore it"):
        Gallery.open(tmp_path / "g")


def test_changes_are_streamed(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", drawn(60_000, 128), np.arange(60_000))
    new = drawn(10, 128, seed=1)
    size = gallery.embeddings.nbytes
    tracemalloc.start()
    gallery.add(new, [f"new{i}" for i in range(10)]).remove(subject_ids=["new3"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size  # ids and one block; the vectors alone would take `size` for one copy


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    gallery = Gallery.build(tmp_path / "g", drawn(2), ["a", "b"])
    with write_lock(tmp_path / "g"), pytest.raises(DataError, match="being changed by another process"):
        gallery.add(drawn(1), ["c"])
