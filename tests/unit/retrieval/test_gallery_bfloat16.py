"""Search by products in bfloat16: the same lists as one by one, and a bound on the error that holds."""

import numpy as np
import pytest
import torch

from retrieval.gallery import bfloat16, sources
from retrieval.gallery.bfloat16 import TOLERANCE, nearest_rows_bfloat16, pays
from retrieval.gallery.search import Request, search_source
from retrieval.gallery.segments import Entries, Rows
from retrieval.gallery.sources import FlatSource

DIM = 24


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(sources, "pays", lambda probes, rows: True)
    monkeypatch.setattr(bfloat16, "_BLOCK_ROWS", 64)


def unit(values):
    return (values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)


def random_rows(count, seed=0, dim=DIM):
    return unit(np.random.default_rng(seed).standard_normal((count, dim)))


def source_of(vectors, part=150):
    names = np.arange(len(vectors)).astype(str)
    entries = Entries(names, names, np.ones(len(vectors), np.float32), np.arange(len(vectors)))
    parts = [vectors[start : start + part] for start in range(0, len(vectors), part)]
    return FlatSource(Rows(parts, vectors.shape[1]), entries)


def brute_force(vectors, probes, top):
    scores = (probes.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    order = np.lexsort((np.broadcast_to(np.arange(len(vectors)), scores.shape), -scores), axis=1)[:, :top]
    return order, np.take_along_axis(scores, order, axis=1)


PROBE = random_rows(1, seed=9)
CASES = {
    "random": random_rows(1000),
    "few": random_rows(7),
    "fewer than a block": random_rows(50),
    "repeated": np.repeat(random_rows(40), 25, axis=0),
    "nearer and nearer": unit(PROBE * np.linspace(0, 3, 700)[:, None] + random_rows(700, seed=3)),
    "nearer than bfloat16 sees": unit(PROBE + 2e-3 * random_rows(900, seed=4)),
    "all behind the probe": unit(-PROBE + 0.3 * random_rows(600, seed=5)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("request_of", [Request(top=10), Request(top=1), Request(top=None, threshold=0.2)])
def test_lists_are_those_of_brute_force(name, request_of):
    vectors = CASES[name]
    probes = np.concatenate([PROBE, random_rows(30, seed=1), vectors[:5]])
    found = search_source(source_of(vectors), probes, request_of)
    order, scores = brute_force(vectors, probes, request_of.top or len(vectors))
    for near, rows, values in zip(found, order, scores, strict=True):
        kept = len(values) if request_of.threshold is None else int((values > request_of.threshold).sum())
        assert [int(candidate.entry_id) for candidate in near] == rows[:kept].tolist()
        assert [candidate.score for candidate in near] == values[:kept].tolist()


@pytest.mark.parametrize("dim", [3, 64, 512, 2048])
def test_the_error_is_below_the_bound(dim):
    """On random pairs, on equal ones, and on values whose roundings all point one way."""
    up = np.full((1, dim), 1.0039, np.float32) / np.sqrt(dim)  # just below the middle of two bfloat16 numbers
    vectors = np.concatenate([random_rows(200, dim=dim), unit(up), -unit(up)])
    probes = np.concatenate([vectors[:100], unit(up)])
    exact = probes.astype(np.float64) @ vectors.astype(np.float64).T
    found = nearest_rows_bfloat16(Rows([vectors], dim), probes, len(vectors))
    assert found.tolerance == TOLERANCE
    half = torch.from_numpy(probes).bfloat16() @ torch.from_numpy(vectors).bfloat16().T
    worst = np.abs(half.double().numpy() - exact).max()
    assert 0 < worst < TOLERANCE


def test_the_left_out_are_not_better_than_it_says():
    vectors, probes = random_rows(1000), random_rows(20, seed=1)
    found = nearest_rows_bfloat16(Rows([vectors], DIM), probes, 10)
    exact = probes @ vectors.T
    for scores, rows, left_out in zip(exact, found.rows, found.left_out, strict=True):
        missing = np.setdiff1d(np.arange(1000), rows)
        assert len(set(rows.tolist())) == len(rows)
        assert scores[missing].max() <= left_out + TOLERANCE


def test_small_searches_stay_in_float32(monkeypatch):
    monkeypatch.setattr(bfloat16, "has_bf16_units", lambda: True)
    monkeypatch.setattr("sys.platform", "linux")
    assert pays(1000, 1_000_000)
    assert not pays(1, 1_000_000_000)
    assert not pays(1000, 1000)
    monkeypatch.setattr(bfloat16, "has_bf16_units", lambda: False)
    assert not pays(1000, 1_000_000)
