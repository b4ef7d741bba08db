"""Exact search by products in blocks and groups, beside a full sort."""

import numpy as np
import pytest
import torch

from aroface.errors import ConfigError
from retrieval.gallery import flat_on_gpu
from retrieval.gallery.flat_on_gpu import FlatOnGPU
from retrieval.gallery.segments import Rows

CPU = torch.device("cpu")
DIM = 16


def unit(count, seed):
    values = np.random.default_rng(seed).normal(size=(count, DIM))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(flat_on_gpu, "_GROUP", 8)
    monkeypatch.setattr(flat_on_gpu, "_UPLOAD_ROWS", 100)


@pytest.mark.parametrize("count", [1, 7, 40, 999])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("block", [64, 8000, 1 << 20])
@pytest.mark.parametrize("use_float16", [False, True])
def test_lists_are_those_of_a_full_sort(monkeypatch, small, count, devices, block, use_float16):
    """999 rows: neither groups nor blocks come out even. Scores are off by float16's rounding at most."""
    monkeypatch.setattr(flat_on_gpu, "_BLOCK_SCORES", block)
    vectors, probes = unit(999, 0), unit(10, 1)
    index = FlatOnGPU(Rows([vectors[:300], vectors[300:]], DIM), [CPU] * devices, use_float16=use_float16)
    scores, rows = index.search(probes, count)
    exact = probes.astype(np.float64) @ vectors.T.astype(np.float64)
    tolerance = 2.0**-9 if use_float16 else 1e-6
    assert scores.shape == rows.shape == (10, count)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == count for row in rows.tolist())
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), atol=tolerance)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :count], atol=tolerance)


def test_what_is_left_out_scores_no_higher_than_the_last(small):
    """Ties over many groups, where any of them may be listed."""
    scores = torch.randint(0, 4, (6, 403), generator=torch.Generator().manual_seed(0)).float()
    values, columns = flat_on_gpu._highest(scores, 9)
    assert torch.equal(values, scores.gather(1, columns))
    assert all(len(set(row)) == 9 for row in columns.tolist())
    rest = scores.scatter(1, columns, -1.0)
    assert (rest.amax(1) <= values.amin(1)).all()


def test_fewer_rows_than_devices(small):
    vectors = unit(2, 0)
    scores, rows = FlatOnGPU(Rows([vectors], DIM), [CPU] * 5, use_float16=False).search(vectors[1:], 2)
    assert rows.tolist() == [[1, 0]]
    assert scores[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_products_are_whole_float32_whatever_is_allowed(monkeypatch, precision):
    products, seen = flat_on_gpu._products, []
    monkeypatch.setattr(flat_on_gpu, "_products", lambda *given: seen.append(matmul.fp32_precision) or products(*given))
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        FlatOnGPU(Rows([unit(20, 0)], DIM), [CPU], use_float16=False).search(unit(2, 1), 3)
        assert seen == ["ieee"]
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before


def test_blocks_shrink_until_there_is_room(monkeypatch, small):
    monkeypatch.setattr(flat_on_gpu, "_BLOCK_SCORES", 1 << 13)
    monkeypatch.setattr(flat_on_gpu, "_LEAST_SCORES", 1 << 5)
    products, vectors, probes = flat_on_gpu._products, unit(999, 0), unit(4, 1)
    room = 200

    def limited(given, block):
        if len(given) * len(block) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return products(given, block)

    index = FlatOnGPU(Rows([vectors], DIM), [CPU, CPU], use_float16=False)
    expected = index.search(probes, 5)
    monkeypatch.setattr(flat_on_gpu, "_products", limited)
    found = index.search(probes, 5)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    room = 0
    with pytest.raises(ConfigError, match=r"search of 4 probes on 2 GPU.*choose cpu"):
        index.search(probes, 5)


def test_long_lists_are_made_of_few_probes_at_a_time(monkeypatch, small):
    index = FlatOnGPU(Rows([unit(50, 0)], DIM), [CPU], use_float16=False)
    expected = index.search(unit(7, 1), 50)
    searched, search = [], index._search
    monkeypatch.setattr(flat_on_gpu, "_BLOCK_PLACES", 100)
    monkeypatch.setattr(index, "_search", lambda probes, count: searched.append(len(probes)) or search(probes, count))
    found = index.search(unit(7, 1), 50)
    assert searched == [2, 2, 2, 1]
    np.testing.assert_array_equal(found[1], expected[1])
    monkeypatch.setattr(flat_on_gpu, "_BLOCK_PLACES", 49)  # less than one list
    np.testing.assert_array_equal(index.search(unit(7, 1), 50)[1], expected[1])
