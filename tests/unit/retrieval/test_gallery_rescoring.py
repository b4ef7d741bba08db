"""Scores of whole batches, read segment by segment, beside the plain twin: pair by pair, list by list."""

from typing import Any

import numpy as np
import pytest

from retrieval.gallery import Candidate, search, sources
from retrieval.gallery.search import Request, exact_products, rounding_bound
from retrieval.gallery.segments import Entries, Rows
from retrieval.gallery.sources import FlatSource
from retrieval.gallery.vectors import as_unit, lengths

Array = np.ndarray[Any, Any]
COUNT, PROBES, LIST = 500, 30, 40


def _unit(count: int, dimension: int, seed: int) -> Array:
    return as_unit(np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32))


def _source(vectors: Array) -> FlatSource:
    numbers = np.arange(len(vectors))
    entries = Entries(numbers.astype(str), (numbers % 7).astype(str), np.ones(len(vectors), np.float32), numbers)
    return FlatSource(Rows([vectors[:1], vectors[1:200], vectors[200:]], vectors.shape[1]), entries)


def _rows(seed: int = 2) -> Array:
    """(P, K) different rows in each list, some of them missing; one list is empty."""
    generator = np.random.default_rng(seed)
    rows = np.stack([generator.permutation(COUNT)[:LIST] for _ in range(PROBES)])
    rows[generator.random(rows.shape) < 0.2] = -1
    rows[3] = -1
    return rows


def _plain_scores(vectors: Array, probes: Array, rows: Array) -> Array:
    scores = np.full(rows.shape, -np.inf, np.float32)
    for place in np.argwhere(rows >= 0):
        pair = vectors[rows[tuple(place)]].astype(np.float64) * probes[place[0]]
        scores[tuple(place)] = np.float32(pair.sum())
    return scores


def _plain_lists(source: FlatSource, rows: Array, scores: Array, request: Request) -> list[list[Candidate]]:
    lists = []
    for own_rows, own_scores in zip(rows.tolist(), scores, strict=True):
        near: list[Candidate] = []
        for row, score in zip(own_rows, own_scores.tolist(), strict=True):
            (name,), (subject,) = (ids.tolist() for ids in source.names(np.array([row])))
            if row < 0 or (request.threshold is not None and not score > request.threshold):
                continue
            if not (request.by_subject and any(c.subject_id == subject for c in near)):
                near.append(Candidate(name, subject, score, len(near) + 1))
        lists.append(near[: request.top])
    return lists


@pytest.mark.parametrize("dimension", [1, 24, 300, 512])
@pytest.mark.parametrize("elements", [1, 5000, 1 << 15])
def test_exact_scores_are_those_of_each_pair_alone(
    monkeypatch: pytest.MonkeyPatch, dimension: int, elements: int
) -> None:
    monkeypatch.setattr(sources, "_EXACT_ELEMENTS", elements)  # blocks of one row, of a few, as they are
    vectors, probes, rows = _unit(COUNT, dimension, 0), _unit(PROBES, dimension, 1), _rows()
    scores = _source(vectors).exact_scores(probes, rows)
    np.testing.assert_array_equal(scores, _plain_scores(vectors, probes, rows))
    rough = _source(vectors).approximate_scores(probes, rows)
    np.testing.assert_array_equal(np.isinf(rough), rows < 0)
    assert np.abs(rough[rows >= 0] - scores[rows >= 0]).max() <= rounding_bound(dimension)


def test_the_score_of_two_vectors_does_not_depend_on_its_company() -> None:
    vectors, probes = _unit(COUNT, 131, 0), _unit(COUNT, 131, 1)
    together = exact_products(vectors, probes)
    alone = [exact_products(v[None], p[None])[0] for v, p in zip(vectors, probes, strict=True)]
    np.testing.assert_array_equal(together, alone)
    order = np.random.default_rng(2).permutation(COUNT)
    np.testing.assert_array_equal(exact_products(vectors[order], probes[order]), together[order])
    np.testing.assert_array_equal(exact_products(vectors[::3], probes[::3]), together[::3])  # rows with gaps


@pytest.mark.parametrize("top", [1, 10, LIST - 4, None])
def test_rows_that_float32_rules_out_are_not_among_the_best(top: int | None) -> None:
    vectors, probes, rows = _unit(COUNT, 24, 0), _unit(PROBES, 24, 1), _rows()
    vectors[100:200] = vectors[:100]  # ties
    found, scores = search._rescored(_source(vectors), probes, rows, top)
    plain = _plain_scores(vectors, probes, rows)
    for probe in range(PROBES):
        pairs = zip(rows[probe].tolist(), plain[probe].tolist(), strict=True)
        best = sorted((-score, row) for row, score in pairs if row >= 0)[:top]
        own = zip(scores[probe].tolist(), found[probe].tolist(), strict=True)
        assert [(-score, row) for score, row in own if row >= 0][:top] == best


@pytest.mark.parametrize("by_subject", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("top", [1, 6, 100, None])
def test_lists_of_a_batch_are_those_made_one_by_one(top: int | None, threshold: float | None, by_subject: bool) -> None:
    vectors, probes = _unit(COUNT, 24, 0), _unit(PROBES, 24, 1)
    source, request = _source(vectors), Request(top, by_subject, threshold)
    rows, scores = search._rescored(source, probes, _rows(), None)
    expected = _plain_lists(source, rows, scores, request)
    assert search._chosen(source, rows, scores, request) == expected
    assert not expected[3]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_lengths_and_unit_vectors_of_many_blocks(kind: type) -> None:
    values = np.random.default_rng(0).standard_normal((1000, 33)).astype(kind)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths(values), norms, rtol=1e-14)
    np.testing.assert_allclose(as_unit(values), values / norms[:, None], rtol=2e-7)
    assert lengths(values[:0]).shape == (0,)
