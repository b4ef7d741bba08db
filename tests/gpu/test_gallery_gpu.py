"""Galleries on one GPU and on all of them give what the exact search on the CPU gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval.gallery import Gallery, IndexWish
from retrieval.gallery.on_gpu import MAX_LIST

faiss: Any = pytest.importorskip("faiss")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs a build of Faiss with GPU support"),
]

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
    assert "7" not in {c.entry_id for c in changed.search(ENROLLED[7], top=MAX_LIST // 2)[0]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["ivf", "ivf-fp16", "ivf-sq8"])
def test_clusters_find_what_they_find_on_the_cpu(tmp_path: Path, kind: Any, device: str) -> None:
    wish = IndexWish(kind, recall=0.95, sample=100, probes=PROBES)
    on_cpu = Gallery.build(tmp_path / "g", ENROLLED, np.arange(5000) % 500, index=wish)
    gallery = Gallery.open(tmp_path / "g", device=device)
    exact = on_cpu.compact("flat").search(PROBES, top=1)
    found = gallery.search(PROBES, top=1)
    recall = np.mean([near[0].score >= best[0].score for near, best in zip(found, exact, strict=True)])
    assert on_cpu.info.recall is not None
    assert recall >= on_cpu.info.recall.at_1 - 0.03
