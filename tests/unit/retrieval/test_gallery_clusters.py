"""Clusters chosen in bfloat16: as near as those of float32 within its rounding, and the search behind them the same."""

import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from retrieval.gallery import Gallery, IndexWish, clusters
from retrieval.gallery.bfloat16 import TOLERANCE
from retrieval.gallery.clusters import Clusters
from retrieval.gallery.vectors import as_unit

Array = np.ndarray[Any, Any]
DIM, CLUSTERS, PROBES = 32, 64, 80


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with bfloat16 products; PyTorch computes the same on others."""
    import torch  # noqa: F401  # the choice is made here where it is loaded

    monkeypatch.setattr(clusters, "has_bf16_units", lambda: True)


def _drawn(count: int, seed: int) -> Array:
    return as_unit(np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32))


@pytest.fixture(scope="module", params=["Flat", "PQ16x4fs"])
def index(request: pytest.FixtureRequest) -> Any:
    made = faiss.index_factory(DIM, f"IVF{CLUSTERS},{request.param}", faiss.METRIC_INNER_PRODUCT)
    made.train(_drawn(4000, 1))
    made.add(_drawn(4000, 2))
    return made


def _called(index: Any, monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Records the clusters of searches with given ones."""
    visited: list[Array] = []
    search = index.search_preassigned

    def recorded(probes: Array, count: int, given: Array, scores: Array) -> Any:
        visited.append(given)
        return search(probes, count, given, scores)

    monkeypatch.setattr(index, "search_preassigned", recorded, raising=False)
    return visited


@pytest.mark.parametrize("visits", [1, 5, CLUSTERS])
def test_no_visited_cluster_is_farther_than_one_left_out(
    index: Any, visits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = _drawn(PROBES, 3)
    visited = _called(index, monkeypatch)
    index.nprobe = visits
    Clusters(index).search(probes, 3)
    exact = probes.astype(np.float64) @ index.quantizer.reconstruct_n(0, CLUSTERS).astype(np.float64).T
    for scores, near in zip(exact, visited[0], strict=True):
        assert len(set(near.tolist())) == visits
        left_out = np.delete(scores, near)
        assert scores[near].min() >= left_out.max(initial=-np.inf) - 2 * TOLERANCE


def test_with_all_clusters_it_finds_what_faiss_finds(index: Any) -> None:
    probes = _drawn(PROBES, 4)
    index.nprobe = CLUSTERS
    scores, places = index.search(probes, 7)
    found_scores, found_places = Clusters(index).search(probes, 7)
    np.testing.assert_allclose(found_scores, scores, atol=1e-6)  # float32 sums of another order
    # Codes of few bits give equal scores, whose order is free.
    is_single = (np.diff(scores, axis=1, prepend=np.inf) < -1e-5) & (np.diff(scores, axis=1, append=-np.inf) < -1e-5)
    assert is_single.any()
    np.testing.assert_array_equal(found_places[is_single][:-1], places[is_single][:-1])


def test_few_probes_other_processors_and_without_pytorch_faiss_chooses(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = _drawn(PROBES, 5)
    visited = _called(index, monkeypatch)
    index.nprobe = 5
    chosen = Clusters(index)
    chosen.search(probes[:63], 3)
    assert not visited
    chosen.search(probes[:64], 3)
    assert len(visited) == 1
    with monkeypatch.context() as patch:
        patch.setattr(clusters, "has_bf16_units", lambda: False)
        np.testing.assert_array_equal(chosen.search(probes, 3)[1], index.search(probes, 3)[1])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        chosen.search(probes, 3)
    assert len(visited) == 1


def test_codes_of_residuals_are_refused() -> None:
    index = faiss.index_factory(DIM, "IVF4,SQ8", faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(ValueError, match="residuals"):
        Clusters(index)


def test_a_gallery_keeps_its_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = _drawn(500, 6)
    enrolled = as_unit(np.repeat(people, 8, axis=0) + 0.5 * _drawn(4000, 7))
    probes = as_unit(people + 0.5 * _drawn(500, 8))
    gallery = Gallery.build(
        tmp_path / "g", enrolled, np.repeat(np.arange(500), 8), index=IndexWish("ivf-pq", probes=probes)
    )
    found = gallery.search(probes, top=1)
    truth = (enrolled.astype(np.float64) @ probes.astype(np.float64).T).max(axis=0)
    assert np.mean([near[0].score >= best - 1e-6 for near, best in zip(found, truth, strict=True)]) >= 0.97
    monkeypatch.setattr(clusters, "has_bf16_units", lambda: False)
    by_faiss = gallery.search(probes, top=1)
    assert np.mean([a[0] == b[0] for a, b in zip(found, by_faiss, strict=True)]) >= 0.98
