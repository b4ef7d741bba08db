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
    errors = scores <= threshold
    curve = []
    for level in np.unique(quality):
        kept = quality >= level
        curve.append((float(1 - kept.mean()), float(errors[kept].mean())))
    return curve


def partial_area(curve: list[tuple[float, float]], limit: float) -> float:
    """Area under the step curve over [0, limit]; divide by the limit for the mean error of that stretch."""
    edges = [min(x, limit) for x, _ in curve] + [limit]
    return sum((right - left) * y for left, right, (_, y) in zip(edges, edges[1:], curve, strict=False))
