"""From a wanted false-positive rate to a threshold: the canonical rule, and those of published evaluators.

The canonical rule never lets more than floor(rate * N) negatives through, ties included. The others exist only to
compare with numbers that were made by them; each names its origin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MIN_SUPPORTED",
    "PAIR_RULES",
    "RULES",
    "OperatingPoint",
    "Rule",
    "accepts",
    "allowed_false_positives",
    "operating_point",
    "operating_points",
]

#: canonical   accept above the (K+1)-th largest negative, K = floor(rate * N); ranks count ties against the probe
#: nearest     insightface, AdaFace, CVLface 1:1: the ROC corner whose rate is nearest, even when it is above
#: pfe_int     AdaFace IJB-S: K = int(rate * N), accept from the K-th largest on
#: pfe_round   PFE, TinyFace copies: K = round(rate * N), accept from the K-th largest on
#: ijb_evals   insightface 1:N: index max(int(rate * N) - 1, 0) of the non-mated maxima, mate strictly on top
#: ijb_1n      insightface and AdaFace 1:N: galleries merged, false alarms among all impostor pairs over probes, no rank
#: argsort_rev PFE family: ranks by reversed argsort, so that of equal scores the last column wins and a failed template
#:             scores 0; thresholds by pfe_int
Rule = Literal["canonical", "nearest", "pfe_int", "pfe_round", "ijb_evals", "ijb_1n", "argsort_rev"]
RULES: tuple[Rule, ...] = get_args(Rule)
#: The rules that say something about lists of pairs.
PAIR_RULES: tuple[Rule, ...] = ("canonical", "nearest", "pfe_int", "pfe_round", "ijb_evals")

#: Rule of 30: with fewer false positives than this behind it, a rate is not statistically supported.
MIN_SUPPORTED = 30
#: Guards floor(rate * N) against products such as 0.1 * 30 = 2.999...
_FLOOR_GUARD = 1e-9


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold and what it lets through."""

    threshold: float  #: -inf accepts every score
    is_strict: bool  #: accept iff score > threshold, else iff score >= threshold
    k: int  #: false positives that the rate allows
    realised: float  #: rate of false positives at the threshold


def accepts(scores: NDArray[Any], point: OperatingPoint) -> NDArray[np.bool_]:
    """Which scores are accepted."""
    result: NDArray[np.bool_] = scores > point.threshold if point.is_strict else scores >= point.threshold
    return result


def allowed_false_positives(count: float, rate: float) -> int:
    """K = floor(rate * count), guarded against the rounding of the product."""
    return math.floor(rate * count + _FLOOR_GUARD)


def operating_point(
    negatives: NDArray[Any], rate: float, *, rule: Rule = "canonical", positives: NDArray[Any] | None = None
) -> OperatingPoint:
    """Threshold for one rate of false positives; see `operating_points`."""
    return operating_points(negatives, [rate], rule=rule, positives=positives)[0]


def operating_points(
    negatives: NDArray[Any],
    rates: Sequence[float],
    *,
    rule: Rule = "canonical",
    positives: NDArray[Any] | None = None,
    is_sorted: bool = False,
) -> list[OperatingPoint]:
    """Thresholds for rates of false positives.

    Args:
        negatives: (N,) scores that should be rejected; -inf for comparisons that could not be made. N >= 1.
        rates: wanted false-positive rates, in [0, 1].
        rule: see `Rule`; `ijb_1n` has no threshold of this kind.
        positives: genuine scores, for `nearest` alone.
        is_sorted: the negatives ascend already.

    Source: docs of the protocols, sections 1.5 and 1.8.
    """
    ascending = negatives if is_sorted else np.sort(negatives)
    if rule == "nearest":
        if positives is None:
            raise ValueError("the rule `nearest` walks the ROC curve and needs the genuine scores")
        thresholds = [(value, False) for value in _nearest(np.sort(positives), ascending, rates)]
    else:
        thresholds = [_threshold(ascending, rate, rule) for rate in rates]
    count = len(ascending)
    points = []
    for rate, (threshold, is_strict) in zip(rates, thresholds, strict=True):
        # In the precision of the scores, as the comparisons of `accepts` are made: max + 1e-8 is max in float32.
        value = np.asarray(threshold, ascending.dtype)
        passed = count - int(np.searchsorted(ascending, value, side="right" if is_strict else "left"))
        k = min(count, allowed_false_positives(count, rate))
        points.append(OperatingPoint(threshold, is_strict, k, passed / count))
    return points


def _threshold(ascending: NDArray[Any], rate: float, rule: Rule) -> tuple[float, bool]:
    count = len(ascending)

    def largest(index: int) -> float:
        return float(ascending[count - 1 - index])

    match rule:
        case "canonical":
            k = allowed_false_positives(count, rate)
            return (-math.inf if k >= count else largest(k)), True
        case "pfe_int" | "argsort_rev":
            allowed = int(rate * count)
            return (largest(0) + 1e-8 if allowed == 0 else largest(allowed - 1)), False
        case "pfe_round":
            allowed = round(rate * count)
            return (largest(0) + 1e-5 if allowed == 0 else largest(allowed - 1)), False
        case "ijb_evals":
            return largest(max(int(rate * count) - 1, 0)), True
        case _:
            raise ValueError(f"the rule {rule!r} gives no threshold of its own")


def _nearest(positives: NDArray[Any], negatives: NDArray[Any], rates: Sequence[float]) -> list[float]:
    """Thresholds of the ROC corners whose false-positive rates are nearest; of equals, the one that accepts most.

    Both arrays ascend.
    """
    thresholds = np.unique(np.concatenate([positives, negatives]))[::-1]
    true = len(positives) - np.searchsorted(positives, thresholds, side="left")
    false = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    # Points on a straight stretch of the curve are left out, as the ROC function of those evaluators does.
    is_corner = np.ones(len(true), bool)
    is_corner[1:-1] = (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0)
    false = np.append(0, false[is_corner])
    corners = np.append(math.inf, thresholds[is_corner])
    chosen = []
    for rate in rates:
        distance = np.abs(false / len(negatives) - rate)
        chosen.append(float(corners[np.flatnonzero(distance == distance.min())[-1]]))
    return chosen
