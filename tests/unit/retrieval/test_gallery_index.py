"""Approximate kinds: recall as stated, candidates scored exactly, changes seen at once, files of others refused."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from aroface.errors import ConfigError, DataError
from retrieval.devices import gpu_numbers
from retrieval.gallery import INDEX_KINDS, Gallery, IndexWish, flat_on_gpu, on_gpu
from retrieval.gallery.index import factory_of, num_clusters
from retrieval.gallery.on_gpu import flat_on, on_devices
from retrieval.gallery.search import Request, search_source
from retrieval.gallery.sources import IndexedSource, TrackedIndex
from retrieval.gallery.vectors import as_unit
from tests.helpers.search_devices import stand_in_devices

Array = np.ndarray[Any, Any]
DIM, PEOPLE = 32, 400


def _unit(values: Array) -> Array:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _faces(images: int, spread: float, seed: int) -> Array:
    """`images` of each person, person by person."""
    people = _unit(np.random.default_rng(0).normal(size=(PEOPLE, DIM)))
    noise = np.random.default_rng(seed).normal(size=(PEOPLE * images, DIM))
    return (np.repeat(people, images, axis=0) + spread * _unit(noise)).astype(np.float32)


ENROLLED, SUBJECTS = _faces(3, 0.7, 1), np.repeat(np.arange(PEOPLE), 3)
PROBES = _faces(1, 0.7, 2)[:50]


def _exact(enrolled: Array, probe: Array) -> Array:
    wide = _unit(enrolled.astype(np.float64)).astype(np.float32).astype(np.float64)
    return (wide * _unit(probe[None].astype(np.float64)).astype(np.float32)).sum(axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    for kind in INDEX_KINDS:
        Gallery.build(root / kind, ENROLLED, SUBJECTS, index=IndexWish(kind, recall=0.95, sample=100))
    return {kind: root / kind for kind in INDEX_KINDS}


@pytest.mark.parametrize("kind", [kind for kind in INDEX_KINDS if kind != "flat"])
def test_kinds_reach_the_recall_that_they_state(built: dict[str, Path], kind: str) -> None:
    gallery = Gallery.open(built[kind])
    record = gallery.manifest.index_record
    assert record is not None
    assert gallery.info.recall == record.recall
    assert record.recall.probes == 100
    assert record.recall.at_1 >= 0.95
    hits = []
    for probe, found in zip(PROBES, gallery.search(PROBES, top=5), strict=True):
        scores = _exact(ENROLLED, probe)
        assert [c.score for c in found] == [scores[int(c.entry_id)] for c in found]  # scored as the flat kind does
        keys = [(-c.score, int(c.entry_id)) for c in found]
        assert keys == sorted(keys)
        hits.append(found[0].score == scores.max())
    assert np.mean(hits) >= 0.9


def test_recall_is_measured_with_given_probes_against_brute_force(tmp_path: Path) -> None:
    wish = IndexWish("ivf-pq", recall=1.1, sample=1000, probes=PROBES)  # out of reach: the greatest effort
    gallery = Gallery.build(tmp_path / "g", ENROLLED, SUBJECTS, index=wish)
    record = gallery.manifest.index_record
    assert record is not None
    found = gallery.search(PROBES, top=10)
    scores = [_exact(ENROLLED, probe) for probe in PROBES]
    at_1 = np.mean([near[0].score >= s.max() for near, s in zip(found, scores, strict=True)])
    at_10 = np.mean([sum(c.score >= np.sort(s)[-10] for c in near) / 10 for near, s in zip(found, scores, strict=True)])
    assert (record.recall.at_1, record.recall.source, record.recall.probes) == (at_1, "given", 50)
    assert record.recall.at_10 == pytest.approx(at_10)


def test_a_low_recall_is_cheaper_and_said(tmp_path: Path, caplog: Any) -> None:
    def effort(recall: float) -> int:
        wish = IndexWish("ivf", recall=recall, sample=100)
        record = Gallery.build(tmp_path / "g", ENROLLED, SUBJECTS, index=wish, replace=True).manifest.index_record
        assert record is not None
        return record.effort

    assert effort(0.1) < effort(0.97)
    assert not caplog.records
    effort(1.1)
    assert "recall@1 is" in caplog.text


@pytest.mark.parametrize("kind", ["ivf-pq", "hnsw", "sq8"])
def test_changes_are_seen_before_the_index_is_made_anew(built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    shutil.copytree(built[kind], tmp_path / "g")
    gallery = Gallery.open(tmp_path / "g").add(PROBES[:3], ["x", "y", "z"], ["n0", "n1", "n2"])
    for place in range(3):
        best = gallery.search(PROBES[place], top=1)[0][0]
        assert (best.entry_id, best.score) == (f"n{place}", pytest.approx(1))
    best = gallery.search(PROBES[5], top=1)[0][0]
    gone = gallery.search(PROBES[5], top=1, level="subject")[0][0].subject_id
    gallery = gallery.remove(subject_ids=[best.subject_id, gone, "y"])
    subjects = {c.subject_id for near in gallery.search(PROBES[[1, 5]], top=600) for c in near}
    assert not subjects & {best.subject_id, gone, "y"}
    assert gallery.outside_index == (2, len({best.subject_id, gone}) * 3)
    before = gallery.search(PROBES[:3], top=1)
    compact = gallery.compact()
    assert compact.outside_index == (0, 0)
    assert compact.manifest.index_record != gallery.manifest.index_record
    assert compact.search(PROBES[[0, 2]], top=1) == [before[0], before[2]]
    assert len(list((tmp_path / "g").glob("index-*"))) == 1
    flat = compact.compact("flat")
    assert flat.info.recall is None
    assert not list((tmp_path / "g").glob("index*"))
    assert [c.score for c in flat.search(PROBES[9], top=3)[0]] == sorted(
        _exact(flat.embeddings, PROBES[9]).tolist(), reverse=True
    )[:3]


def test_removing_most_of_an_index_leaves_full_lists(built: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(built["sq8"], tmp_path / "g")
    gallery = Gallery.open(tmp_path / "g").remove(subject_ids=[str(i) for i in range(PEOPLE - 20)])
    for near in gallery.search(PROBES[:10], top=30):
        assert len(near) == 30
    for near in gallery.search(PROBES[:10], top=20, level="subject"):
        assert len({c.subject_id for c in near}) == 20
    assert {len(near) for near in gallery.search_range(PROBES[:10], threshold=-2)} == {60}


def test_an_index_of_another_gallery_is_refused(built: dict[str, Path], tmp_path: Path) -> None:
    wish = IndexWish("sq8", recall=0.95, sample=100)
    other = Gallery.build(tmp_path / "other", ENROLLED[::-1].copy(), SUBJECTS, index=wish)
    shutil.copytree(built["sq8"], tmp_path / "g")
    assert other.manifest.index_record is not None
    name = other.manifest.index_record.file.name
    shutil.copy(tmp_path / "other" / name, tmp_path / "g" / name)
    with pytest.raises(DataError, match="is damaged or of another gallery"):
        Gallery.open(tmp_path / "g")
    with pytest.raises(DataError, match="is the index of another gallery"):  # without a look at the checksums, too
        Gallery.open(tmp_path / "g", verify=False)


def test_a_writer_that_is_faster_than_the_opening(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    shutil.copytree(built["hnsw"], tmp_path / "g")
    read_index, opened = faiss.read_index, []

    def slow(path: str, flags: int) -> Any:
        opened.append(path)
        if len(opened) == 1:  # compact deletes the file, and opens its own
            Gallery.open(tmp_path / "g", verify=False).compact()
        return read_index(path, flags)

    monkeypatch.setattr(faiss, "read_index", slow)
    gallery = Gallery.open(tmp_path / "g")
    assert gallery.manifest.generation == 2
    assert not Path(opened[0]).exists()


@pytest.mark.parametrize("pattern", ["index-*", "indexed-*"])
def test_a_flipped_byte_of_an_index_is_found(built: dict[str, Path], tmp_path: Path, pattern: str) -> None:
    shutil.copytree(built["hnsw"], tmp_path / "g")
    path = next((tmp_path / "g").glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        Gallery.open(tmp_path / "g")


def test_too_few_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Choose flat"):
        Gallery.build(tmp_path / "g", ENROLLED[:500], SUBJECTS[:500], index="ivf-pq")
    assert not list((tmp_path / "g").glob("[!.]*"))  # nothing is left of the attempt
    gallery = Gallery.build(tmp_path / "g", ENROLLED[:500], SUBJECTS[:500], index="hnsw")
    with pytest.raises(DataError, match="Choose flat"):
        gallery.compact("pq")
    with pytest.raises(DataError, match="have 8 dimensions, the gallery has 32"):
        gallery.compact(IndexWish("hnsw", probes=PROBES[:, :8]))
    assert Gallery.open(tmp_path / "g").manifest == gallery.manifest


def test_sizes_of_clusters_and_codes() -> None:
    assert [num_clusters(n) for n in (1000, 160_000, 1_000_000, 100_000_000)] == [16, 2048, 4096, 16384]
    assert factory_of("ivf-pq", 1_000_000, 512) == "IVF4096,PQ128x4fs"
    assert factory_of("pq", 5000, 9) == "PQ3x4fs"
    assert factory_of("hnsw-sq8", 10, 64) == "HNSW32_SQ8"


class TestDevices:
    """The CPU in the place of the GPUs."""

    def _source(self, gallery: Gallery, devices: int, use_float16: bool) -> IndexedSource:
        cpu = torch.device("cpu")
        tracked = flat_on([cpu] * devices, gallery._rows, gallery.entries.numbers, use_float16=use_float16)
        return IndexedSource(gallery._rows, gallery.entries, tracked, gallery.manifest.next_number)

    @pytest.mark.parametrize("use_float16", [False, True])
    @pytest.mark.parametrize("devices", [1, 3, 8])
    def test_shards_equal_the_exact_search(
        self, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, use_float16: bool, devices: int
    ) -> None:
        monkeypatch.setattr(flat_on_gpu, "_BLOCK_SCORES", 55 * 200)  # several blocks on a device
        monkeypatch.setattr(flat_on_gpu, "_GROUP", 4)
        gallery = Gallery.open(built["flat"])
        source = self._source(gallery, devices, use_float16)
        probes = np.concatenate([PROBES, ENROLLED[:5]])
        for request in (Request(7), Request(5, by_subject=True), Request(None, threshold=0.4)):
            level = "subject" if request.by_subject else "entry"
            expected = (
                gallery.search_range(probes, threshold=0.4)
                if request.top is None
                else gallery.search(probes, top=request.top, level=level)
            )
            assert search_source(source, as_unit(probes), request) == expected

    def test_an_exact_search_lists_as_many_as_there_are(self, built: dict[str, Path]) -> None:
        gallery = Gallery.open(built["flat"])
        probes = as_unit(PROBES[:3])
        found = search_source(self._source(gallery, 3, use_float16=True), probes, Request(None, threshold=-2.0))
        assert found == gallery.search_range(PROBES[:3], threshold=-2.0)
        assert {len(near) for near in found} == {len(ENROLLED)}

    def test_the_longest_list_of_clusters_is_that_of_faiss(
        self, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in_devices(monkeypatch, 1)
        monkeypatch.setattr(on_gpu, "MAX_LIST", 512)
        gallery = Gallery.open(built["ivf"], device="cuda")
        for find in (lambda: gallery.search_range(PROBES[:3], threshold=-2.0), lambda: gallery.search(PROBES, top=513)):
            with pytest.raises(DataError, match="lists at most 512 entries"):
                find()

    def test_clusters_need_a_faiss_for_gpus(self, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        import faiss

        stand_in_devices(monkeypatch, 1)
        monkeypatch.delattr(faiss, "StandardGpuResources")
        assert Gallery.open(built["fp16"], device="cuda").search(PROBES[0], top=1)
        with pytest.raises(ConfigError, match=r"kind ivf is searched on a GPU by Faiss.*Install faiss-gpu"):
            Gallery.open(built["ivf"], device="cuda").make_ready()

    def test_searches_of_a_device_wait_for_each_other(self) -> None:
        busy, overlaps = threading.Lock(), []

        class Index:
            def search(self, probes: Any, count: int) -> tuple[Any, Any]:
                overlaps.append(not busy.acquire(blocking=False))
                time.sleep(0.01)
                busy.release()
                return probes, probes

        tracked = TrackedIndex(Index(), np.arange(3), candidates=1, least=1, has_one_user=True)
        threads = [threading.Thread(target=tracked.search, args=(PROBES, 1)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert overlaps == [False] * 8

    @pytest.mark.parametrize("kind", ["flat", "fp16", "ivf", "ivf-fp16", "ivf-sq8"])
    def test_a_gallery_on_devices_finds_what_it_finds_on_the_cpu(
        self, built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        used = stand_in_devices(monkeypatch, 3)
        shutil.copytree(built[kind], tmp_path / "g")
        on_cpu = Gallery.open(tmp_path / "g")
        gallery = Gallery.open(tmp_path / "g", device="cuda:0,2")
        for level in ("entry", "subject"):
            assert gallery.search(PROBES, top=7, level=level) == on_cpu.search(PROBES, top=7, level=level)
        assert used == {0, 2}
        used.clear()
        changes = (
            lambda g: g.add(PROBES[:1], ["x"], ["new"]),
            lambda g: g.remove(subject_ids=["3", "5"]),
            lambda g: g.add(PROBES[:3], ["x", "y", "z"], ["new", "1", "later"], upsert=True),
        )
        for change in changes:  # what is on the devices stays there, and others are compared beside it
            gallery, on_cpu = change(gallery), Gallery.open(tmp_path / "g")
            for level in ("entry", "subject"):
                assert gallery.search(PROBES, top=7, level=level) == on_cpu.search(PROBES, top=7, level=level)
            assert gallery.search(PROBES[0], top=1)[0][0].entry_id == "new"
            assert used == set()
        assert Gallery.open(tmp_path / "g", device="cuda").search(PROBES, top=7) == on_cpu.search(PROBES, top=7)
        assert used == {0, 1, 2}

    @pytest.mark.parametrize("kind", ["flat", "fp16", "ivf"])
    def test_devices_are_filled_again_when_enough_has_changed(
        self, built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(on_gpu, "_MOST_ADDED", 3)
        monkeypatch.setattr(on_gpu, "_ADDED_SHARE", 0.0)
        monkeypatch.setattr(on_gpu, "_MOST_REMOVED", 2)
        used = stand_in_devices(monkeypatch, 1)
        shutil.copytree(built[kind], tmp_path / "g")
        gallery = Gallery.open(tmp_path / "g", device="cuda")
        gallery.make_ready()
        assert used == {0}
        is_exact = kind != "ivf"  # its index on the disk stays as it is, too

        def fills(changed: Gallery) -> bool:
            used.clear()
            assert changed.search(PROBES, top=7) == Gallery.open(tmp_path / "g").search(PROBES, top=7)
            return used == {0}

        gallery = gallery.add(PROBES[:3], ["x", "y", "z"])
        assert not fills(gallery)
        gallery = gallery.add(PROBES[3:4], ["w"])
        assert fills(gallery) == is_exact
        gallery = gallery.remove(entry_ids=["0", "1"])
        assert not fills(gallery)
        gallery = gallery.remove(entry_ids=["2"])
        assert fills(gallery) == is_exact
        gallery = gallery.compact()
        assert fills(gallery) != is_exact  # the exact kinds need the vectors alone, wherever they lie
        Gallery.build(tmp_path / "g", PROBES, np.arange(len(PROBES)), index="flat", replace=True)
        assert fills(gallery.latest())

    @pytest.mark.parametrize(
        ("kind", "owner", "name", "error"),
        [
            ("flat", flat_on_gpu, "_uploaded", torch.AcceleratorError("CUDA out of memory.\nCompile with more")),
            ("ivf", faiss, "index_cpu_to_gpu_multiple_py", RuntimeError("a stack trace\ncudaMalloc out of memory.")),
        ],
    )
    def test_a_gallery_that_does_not_fit_on_the_devices_says_so(
        self, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, owner: Any, name: str, error: Any
    ) -> None:
        def full(*args: Any, **options: Any) -> Any:
            raise error

        stand_in_devices(monkeypatch, 1)
        monkeypatch.setattr(owner, name, full)
        gallery = Gallery.open(built[kind], device="cuda")
        with pytest.raises(ConfigError, match=r"out of memory\.\)\. Change it to fp16"):
            gallery.make_ready()

    def test_an_fp16_gallery_that_does_not_fit_is_not_told_to_become_one(
        self, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any, **options: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        stand_in_devices(monkeypatch, 1)
        monkeypatch.setattr(flat_on_gpu, "_uploaded", full)
        with pytest.raises(ConfigError, match=r"out of memory\.\)\. Name more GPUs, or choose cpu"):
            Gallery.open(built["fp16"], device="cuda").make_ready()

    def test_devices_are_named_and_checked(self, built: dict[str, Path]) -> None:
        assert gpu_numbers("cpu") == []
        for name, message in (("gpu", "is unknown"), ("cuda:x", "is unknown"), ("cuda:99", "choose cpu")):
            with pytest.raises(ConfigError, match=message):
                Gallery.open(built["flat"], device=name)
        gallery = Gallery.open(built["hnsw"])
        with pytest.raises(ConfigError, match="searched on the CPU only"):
            on_devices("hnsw", None, gallery._rows, gallery.entries.numbers, [0])
