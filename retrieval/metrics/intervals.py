"""How sure a number is: Wilson intervals, and bootstrap over subjects where comparisons are not independent.

A subject drawn w times gives each of its searches and genuine pairs weight w; an impostor pair has the product of the
weights of its two subjects. Thresholds are set anew in every resample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.metrics.rules import allowed_false_positives

__all__ = ["Interval", "bootstrap_tar", "percentile_interval", "resampled_tar", "resampled_weights", "wilson"]

_Z95 = 1.959963984540054
#: A resample rarely needs more than this multiple of the false positives that are wanted; the rest is kept in reserve.
_TAIL_FACTOR, _TAIL_MINIMUM = 1.5, 4000
_DENSE_SUBJECTS = 6000


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval and how it was made."""

    low: float
    high: float
    method: str


def wilson(hits: int, total: int) -> Interval:
    """Wilson score interval of a proportion, for independent trials.

    Source: Wilson, JASA 22 (1927). `total` must be positive.
    """
    share = hits / total
    scale = 1 + _Z95**2 / total
    centre = (share + _Z95**2 / (2 * total)) / scale
    spread = _Z95 * math.sqrt(share * (1 - share) / total + _Z95**2 / (4 * total**2)) / scale
    return Interval(max(0.0, centre - spread), min(1.0, centre + spread), "wilson")


def percentile_interval(values: NDArray[np.float64], *, subjects: int = 0) -> Interval | None:
    """2.5 and 97.5 percentiles of resampled values, NaN left out; None where nothing is left, or one subject alone.

    Where every resample gives 0, or 1, the bootstrap is blind; then it is the Wilson interval of `subjects` trials.
    """
    known = values[~np.isnan(values)]
    if not len(known) or subjects == 1:
        return None
    if subjects and known.min() == known.max() and known[0] in (0.0, 1.0):
        certain = wilson(int(known[0]) * subjects, subjects)
        return Interval(certain.low, certain.high, f"wilson over {subjects} subjects")
    low, high = np.percentile(known, [2.5, 97.5])
    return Interval(float(low), float(high), f"subject bootstrap, {len(values)}")


def resampled_weights(subjects: int, resamples: int, *, seed: int = 0) -> NDArray[np.float32]:
    """(R, S) how often each subject is drawn in each resample; rows sum to S."""
    generator = np.random.default_rng(seed)
    weights = np.empty((resamples, subjects), np.float32)
    for row in weights:
        row[:] = np.bincount(generator.integers(subjects, size=subjects), minlength=subjects)
    return weights


def bootstrap_tar(
    genuine: NDArray[Any],
    genuine_subjects: NDArray[np.int64],
    impostor: NDArray[Any],
    impostor_subjects: tuple[NDArray[np.int64], NDArray[np.int64]],
    rates: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Interval | None]:
    """Intervals of TAR at each FAR; arguments as `resampled_tar`."""
    values = resampled_tar(
        genuine, genuine_subjects, impostor, impostor_subjects, rates, resamples=resamples, seed=seed
    )
    subjects = len(np.unique(genuine_subjects))
    return [percentile_interval(column, subjects=subjects) for column in values.T]


def resampled_tar(
    genuine: NDArray[Any],
    genuine_subjects: NDArray[np.int64],
    impostor: NDArray[Any],
    impostor_subjects: tuple[NDArray[np.int64], NDArray[np.int64]],
    rates: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """TAR at each FAR in resamples of the subjects.

    Args:
        genuine: (G,) scores.
        genuine_subjects: (G,) subject codes, whole numbers from 0.
        impostor: (I,) scores.
        impostor_subjects: the two (I,) subject codes.
        rates: wanted false-accept rates.
        resamples: R.
        seed: of the resampling; equal seeds and subjects draw the same people, so that systems can be compared.

    Returns:
        (R, rates); NaN in a resample without genuine or impostor pairs.
    """
    sides = (genuine_subjects, *impostor_subjects)
    is_there = np.zeros(max(int(side.max(initial=-1)) for side in sides) + 1, bool)
    for side in sides:
        is_there[side] = True
    code = np.cumsum(is_there, dtype=np.int32) - 1
    genuine_code, first, second = (code[side] for side in sides)
    weights = resampled_weights(int(is_there.sum()), resamples, seed=seed)
    totals = _impostor_totals(first, second, weights)
    order = np.argsort(-genuine, kind="stable")
    genuine_code, genuine_sorted = genuine_code[order], -genuine[order]
    tail = _Tail(impostor, first, second, largest_rate=max(rates, default=0.0))
    values = np.full((resamples, len(rates)), np.nan)
    for row, weight, total in zip(values, weights, totals.tolist(), strict=True):
        passed = np.concatenate([[0.0], np.cumsum(weight[genuine_code], dtype=np.float64)])
        if not passed[-1] or not total:
            continue
        allowed = [allowed_false_positives(total, rate) for rate in rates]
        thresholds = tail.thresholds(weight, allowed)
        row[:] = passed[np.searchsorted(genuine_sorted, -thresholds, side="left")] / passed[-1]
    return values


def _impostor_totals(
    first: NDArray[np.int32], second: NDArray[np.int32], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(R,) weighted number of impostor pairs: w' C w with the counts C of pairs between subjects."""
    from scipy.sparse import coo_array

    subjects = weights.shape[1]
    counts = coo_array((np.ones(len(first), np.float32), (first, second)), shape=(subjects, subjects)).tocsr()
    product = counts.toarray() @ weights.T if subjects <= _DENSE_SUBJECTS else counts @ weights.T
    totals: NDArray[np.float64] = np.einsum("sr,rs->r", product, weights, dtype=np.float64)
    return totals


class _Tail:
    """The largest impostor scores in descending order; grows when a resample needs more of them."""

    def __init__(
        self, scores: NDArray[Any], first: NDArray[np.int32], second: NDArray[np.int32], *, largest_rate: float
    ) -> None:
        self._all = scores, first, second
        wanted = math.ceil(largest_rate * len(scores))
        self._take(max(math.ceil(_TAIL_FACTOR * wanted), _TAIL_MINIMUM))

    def _take(self, size: int) -> None:
        scores, first, second = self._all
        if size >= len(scores):
            chosen = np.argsort(-scores, kind="stable")
        else:
            chosen = np.argpartition(scores, len(scores) - size)[len(scores) - size :]
            chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
        self._scores, self._first, self._second = scores[chosen], first[chosen], second[chosen]

    def thresholds(self, weight: NDArray[np.float32], allowed: Sequence[int]) -> NDArray[Any]:
        """Per rate: the first score at which more than the allowed weight has passed; -inf if that never happens."""
        while True:
            passed = np.cumsum(weight[self._first] * weight[self._second], dtype=np.float64)
            places = np.searchsorted(passed, allowed, side="right")
            if len(self._scores) == len(self._all[0]) or places.max(initial=0) < len(self._scores):
                break
            self._take(4 * len(self._scores))
        scores = np.append(self._scores, np.asarray(-np.inf, self._scores.dtype))
        found: NDArray[Any] = scores[places]
        return found
