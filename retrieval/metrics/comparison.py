"""Is system A better than B on the same data: paired tests, because both saw the same searches and pairs.

McNemar looks at the searches on which the two differ, as if they were independent; the paired bootstrap draws people,
because the searches of one person are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.metrics.intervals import Interval, percentile_interval, resampled_tar, resampled_weights

__all__ = ["Comparison", "compare_hits", "compare_tar", "mcnemar"]


@dataclass(frozen=True)
class Comparison:
    """A - B of one metric."""

    first: float
    second: float
    interval: Interval | None  #: of the difference, by the paired bootstrap over subjects
    p_value: float | None  #: two-sided, of no difference, by McNemar; None for rates with a threshold

    @property
    def difference(self) -> float:
        """A - B."""
        return self.first - self.second


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Exact two-sided p-value of two systems' hits on the same trials being equally likely.

    Source: McNemar, Psychometrika 12 (1947), with the binomial distribution in place of its approximation.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not only_first + only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def compare_hits(
    first: NDArray[np.bool_], second: NDArray[np.bool_], subjects: NDArray[Any], *, resamples: int = 1000
) -> Comparison:
    """Compare shares of hits, such as rank <= 1, on the same mated searches.

    Args:
        first: (P,) hits of system A.
        second: (P,) hits of system B.
        subjects: (P,) subject of each search.
        resamples: of the paired bootstrap.
    """
    names, codes = np.unique(subjects, return_inverse=True)
    weights = resampled_weights(len(names), resamples)
    gain = np.bincount(codes, first.astype(float) - second.astype(float), minlength=len(names))
    values = weights @ gain / (weights @ np.bincount(codes, minlength=len(names)))
    return Comparison(float(first.mean()), float(second.mean()), percentile_interval(values), mcnemar(first, second))


def compare_tar(
    scores: tuple[NDArray[np.float32], NDArray[np.float32]],
    same: NDArray[np.bool_],
    subjects: tuple[NDArray[np.int64], NDArray[np.int64]],
    fars: Sequence[float],
    *,
    resamples: int = 1000,
) -> list[Comparison]:
    """Compare TAR at FAR on the same pairs, each system with its own threshold, set anew in every resample.

    Args:
        scores: (P,) of system A and of system B.
        same: (P,) True for genuine.
        subjects: (P,) subject codes of the two sides.
        fars: wanted false-accept rates.
        resamples: of the paired bootstrap; both systems meet the same people in each.
    """
    from retrieval.metrics.rules import accepts, operating_points

    drawn, values = [], []
    for own in scores:
        genuine, impostor = own[same], own[~same]
        points = operating_points(impostor, fars)
        values.append([float(accepts(genuine, point).mean()) for point in points])
        sides = subjects[0][~same], subjects[1][~same]
        drawn.append(resampled_tar(genuine, subjects[0][same], impostor, sides, fars, resamples=resamples))
    differences = drawn[0] - drawn[1]
    return [
        Comparison(one, other, percentile_interval(column), None)
        for one, other, column in zip(*values, differences.T, strict=True)
    ]
