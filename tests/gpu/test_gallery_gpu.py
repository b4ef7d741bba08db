"""Galleries on one GPU and on all of them give what the exact search on the CPU gives."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval.gallery import Gallery, IndexWish, flat_on_gpu, on_gpu

faiss: Any = pytest.importorskip("faiss")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
needs_faiss_gpu = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources"), reason="needs a build of Faiss with GPU support"
)
CLUSTERS = [pytest.param(kind, marks=needs_faiss_gpu) for kind in ("ivf", "ivf-fp16", "ivf-sq8")]

DIM = 128
DEVICES = ["cuda:0", "cuda"]


def _vectors(count: int, seed: int) -> np.ndarray[Any, Any]:
    people = np.random.default_rng(0).normal(size=(500, DIM))
    noise = np.random.default_rng(seed).normal(size=(count, DIM))
    return (people[np.arange(count) % 500] + noise).astype(np.float32)


ENROLLED, PROBES = _vectors(5000, 1), _vectors(64, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["flat", "fp16"])
def test_exact_kinds_equal_the_cpu(tmp_path: Path, kind: Any, device: str) -> None:
    enrolled = np.concatenate([ENROLLED, ENROLLED[:300]])  # ties
    exact = Gallery.build(tmp_path / "g", enrolled, np.arange(len(enrolled)) % 500)
    if kind == "fp16":
        exact.compact("fp16")
    gallery = Gallery.open(tmp_path / "g", device=device)
    for level in ("entry", "subject"):
        assert gallery.search(PROBES, top=10, level=level) == exact.search(PROBES, top=10, level=level)
    assert gallery.search_range(PROBES, threshold=0.5) == exact.search_range(PROBES, threshold=0.5)
    changed = gallery.add(PROBES[:5], np.arange(5), [f"n{i}" for i in range(5)]).remove(entry_ids=["7"])
    assert [near[0].entry_id for near in changed.search(PROBES[:5], top=1)] == [f"n{i}" for i in range(5)]
    assert "7" not in {c.entry_id for c in changed.search(ENROLLED[7], top=3000)[0]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["flat", "fp16"])
def test_many_blocks_and_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, device: str) -> None:
    monkeypatch.setattr(flat_on_gpu, "_BLOCK_SCORES", 64 * 1024)
    exact = Gallery.build(tmp_path / "g", ENROLLED, np.arange(len(ENROLLED)) % 500)
    if kind == "fp16":
        exact.compact("fp16")
    gallery, wanted = Gallery.open(tmp_path / "g", device=device), exact.search(PROBES, top=10)
    gallery.make_ready()
    with ThreadPoolExecutor(8) as pool:
        searches = [pool.submit(gallery.search, PROBES, top=10) for _ in range(200)]
        assert all(search.result() == wanted for search in searches)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CLUSTERS)
def test_clusters_find_what_they_find_on_the_cpu(tmp_path: Path, kind: Any, device: str) -> None:
    wish = IndexWish(kind, recall=0.95, sample=100, probes=PROBES)
    on_cpu = Gallery.build(tmp_path / "g", ENROLLED, np.arange(5000) % 500, index=wish)
    gallery = Gallery.open(tmp_path / "g", device=device)
    exact = on_cpu.compact("flat").search(PROBES, top=1)
    found = gallery.search(PROBES, top=1)
    recall = np.mean([near[0].score >= best[0].score for near, best in zip(found, exact, strict=True)])
    assert on_cpu.info.recall is not None
    assert recall >= on_cpu.info.recall.at_1 - 0.03


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["flat", "fp16", CLUSTERS[1]])
def test_changes_are_seen_and_leave_the_copy_on_the_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, device: str
) -> None:
    Gallery.build(tmp_path / "g", ENROLLED, np.arange(5000) % 500, index=IndexWish(kind, sample=100))
    gallery = Gallery.open(tmp_path / "g", device=device)
    gallery.make_ready()
    with monkeypatch.context() as patch:
        patch.setattr(on_gpu, "on_devices", None)  # filling again would fail
        for number, probe in enumerate(PROBES[:20]):
            gallery = gallery.add(probe[None], ["new"], [f"n{number}"])
            assert gallery.search(probe, top=1)[0][0].entry_id == f"n{number}"
        gallery = gallery.remove(entry_ids=["7", "n3"])
        found = {c.entry_id for near in gallery.search(np.stack([ENROLLED[7], PROBES[3]]), top=50) for c in near}
        assert not found & {"7", "n3"}
        if kind != "ivf-fp16":
            assert gallery.search(PROBES, top=10) == Gallery.open(tmp_path / "g").search(PROBES, top=10)
    monkeypatch.setattr(on_gpu, "_MOST_ADDED", 0)
    monkeypatch.setattr(on_gpu, "_ADDED_SHARE", 0.0)
    gallery = gallery.add(PROBES[:1], ["last"], ["last"])
    assert "last" in {c.entry_id for c in gallery.search(PROBES[0], top=3)[0]}
