"""Embeddings that are drawn, and their cosines as galleries promise them."""

from typing import Any

import numpy as np

__all__ = ["drawn", "exact_cosines"]

Array = np.ndarray[Any, Any]


def drawn(count: int, dimension: int = 16, seed: int = 0) -> Array:
    """(count, dimension) float32, of lengths far from 1."""
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32) * 7


def exact_cosines(enrolled: Array, probe: Array) -> Array:
    """(N,) float32: summed in float64 over the float32 unit vectors of (N, D) and (D,)."""

    def unit(x: Array) -> Array:
        wide = x.astype(np.float64)
        return (wide / np.linalg.norm(wide, axis=-1, keepdims=True)).astype(np.float32)

    return (unit(enrolled).astype(np.float64) * unit(probe)).sum(axis=1).astype(np.float32)
