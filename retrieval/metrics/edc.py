"""Error versus discard: how the false non-match rate falls when comparisons of low quality are left out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["edc", "partial_area"]


def edc(scores: NDArray[Any], quality: NDArray[Any], *, threshold: float) -> list[tuple[float, float]]:
    """Error-versus-discard characteristic of genuine comparisons.

    Args:
        scores: (G,) genuine scores; an error is a score not above the threshold.
        quality: (G,) quality of each pair: the smaller of its two samples.
        threshold: fixed.

    Returns:
        (share discarded, false non-match rate among the rest), from nothing discarded on; all comparisons tied at the
        lowest quality go at once.
    """
    order = np.argsort(quality, kind="stable")
    errors = np.cumsum((scores <= threshold)[order])
    _, starts = np.unique(quality[order], return_index=True)
    before = np.where(starts > 0, errors[np.maximum(starts - 1, 0)], 0)
    kept = len(scores) - starts
    rates = (errors[-1] - before) / kept
    return list(zip((starts / len(scores)).tolist(), rates.tolist(), strict=True))


def partial_area(curve: list[tuple[float, float]], limit: float) -> float:
    """Area under the step curve over [0, limit]; divide by the limit for the mean error of that stretch."""
    edges = [min(x, limit) for x, _ in curve] + [limit]
    return sum((right - left) * y for left, right, (_, y) in zip(edges, edges[1:], curve, strict=False))
