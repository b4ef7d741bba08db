"""How sure a number is: Wilson intervals, and bootstrap over subjects where comparisons are not independent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap_tar", "wilson"]

_Z95 = 1.959963984540054
#: Resampled thresholds stay within this multiple of the wanted number of false positives.
_TAIL_FACTOR, _TAIL_MINIMUM = 4, 2000


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


def bootstrap_tar(
    genuine: NDArray[Any],
    genuine_subjects: NDArray[np.int64],
    impostor: NDArray[Any],
    impostor_subjects: tuple[NDArray[np.int64], NDArray[np.int64]],
    rates: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of TAR at each FAR by resampling subjects; the threshold is set anew in every resample.

    A subject drawn w times gives its genuine pairs weight w; an impostor pair has the product of its two weights.

    Args:
        genuine: (G,) scores.
        genuine_subjects: (G,) subject codes 0..S-1.
        impostor: (I,) scores.
        impostor_subjects: the two (I,) subject codes.
        rates: wanted false-accept rates.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        One interval (2.5 and 97.5 percentiles) per rate.
    """
    codes = np.unique(np.concatenate([genuine_subjects, *impostor_subjects]))
    genuine_code = np.searchsorted(codes, genuine_subjects)
    first, second = (np.searchsorted(codes, side) for side in impostor_subjects)
    wanted = math.ceil(max(rates) * len(impostor))
    tail = min(len(impostor), max(_TAIL_FACTOR * wanted, _TAIL_MINIMUM))
    top = np.argpartition(-impostor, tail - 1)[:tail]
    top = top[np.argsort(-impostor[top], kind="stable")]
    top_scores, top_first, top_second = impostor[top], first[top], second[top]
    generator = np.random.default_rng(seed)
    values = np.full((resamples, len(rates)), np.nan)
    for row in values:
        weight = np.bincount(generator.integers(len(codes), size=len(codes)), minlength=len(codes)).astype(np.float64)
        genuine_weight = weight[genuine_code]
        total_genuine = genuine_weight.sum()
        total_impostor = float(weight[first] @ weight[second])
        if not total_genuine or not total_impostor:
            continue
        passed = np.cumsum(weight[top_first] * weight[top_second])
        for column, rate in enumerate(rates):
            # The (K+1)-th largest negative, counted with weights: the first at which more than K have passed.
            index = int(np.searchsorted(passed, math.floor(rate * total_impostor + 1e-9), side="right"))
            threshold = top_scores[index] if index < tail else -math.inf
            row[column] = genuine_weight[genuine > threshold].sum() / total_genuine
    low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
    return [Interval(float(a), float(b), f"subject bootstrap, {resamples}") for a, b in zip(low, high, strict=True)]
