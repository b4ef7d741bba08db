"""From a wanted false-positive rate to a threshold: the canonical rule, and those of published evaluators.

The canonical rule never lets more than floor(rate * N) negatives through, ties included. The others exist only to
compare with numbers that were made by them; each names its origin.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_SUPPORTED", "RULES", "OperatingPoint", "Rule", "accepts", "operating_point"]

Rule = Literal["canonical", "nearest", "pfe_int", "pfe_round", "ijb_evals"]
RULES: tuple[str, ...] = get_args(Rule)

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


def operating_point(
    negatives: NDArray[Any], rate: float, *, rule: Rule = "canonical", positives: NDArray[Any] | None = None
) -> OperatingPoint:
    """Threshold for a rate of false positives.

    Args:
        negatives: (N,) scores that should be rejected; -inf for comparisons that could not be made. N >= 1.
        rate: wanted false-positive rate, in [0, 1].
        rule: see the module.
        positives: genuine scores, for `nearest` alone.

    Source: docs of the protocols, sections 1.5 and 1.8.
    """
    count = len(negatives)
    k = min(count, math.floor(rate * count + _FLOOR_GUARD))
    threshold, is_strict = _threshold(negatives, rate, k, rule, positives)
    point = OperatingPoint(threshold, is_strict, k, 0.0)
    realised = float(accepts(negatives, point).mean())
    return OperatingPoint(threshold, is_strict, k, realised)


def _threshold(
    negatives: NDArray[Any], rate: float, k: int, rule: Rule, positives: NDArray[Any] | None
) -> tuple[float, bool]:
    count = len(negatives)
    match rule:
        case "canonical":
            return (-math.inf if k >= count else _largest(negatives, k)), True
        case "nearest":
            if positives is None:
                raise ValueError("the rule `nearest` walks the ROC curve and needs the genuine scores")
            return _nearest(np.asarray(positives), negatives, rate), False
        case "pfe_int":
            allowed = int(rate * count)
            return (_largest(negatives, 0) + 1e-8 if allowed == 0 else _largest(negatives, allowed - 1)), False
        case "pfe_round":
            allowed = round(rate * count)
            return (_largest(negatives, 0) + 1e-5 if allowed == 0 else _largest(negatives, allowed - 1)), False
        case "ijb_evals":
            return _largest(negatives, max(int(rate * count) - 1, 0)), True


def _largest(values: NDArray[Any], index: int) -> float:
    """The value at `index` (from 0) in descending order."""
    position = len(values) - 1 - index
    return float(np.partition(values, position)[position])


def _nearest(positives: NDArray[Any], negatives: NDArray[Any], rate: float) -> float:
    """Threshold of the ROC corner whose false-positive rate is nearest; of equals, the one that accepts most."""
    scores = np.concatenate([positives, negatives])
    order = np.argsort(-scores, kind="stable")
    is_positive = (np.arange(len(scores)) < len(positives))[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(is_positive)[last_of_tie]
    false = 1 + last_of_tie - true
    thresholds = scores[order][last_of_tie]
    # Points on a straight stretch of the curve are left out, as the ROC function of those evaluators does.
    is_corner = np.ones(len(true), bool)
    is_corner[1:-1] = (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0)
    false = np.append(0, false[is_corner])
    thresholds = np.append(math.inf, thresholds[is_corner])
    distance = np.abs(false / len(negatives) - rate)
    return float(thresholds[np.flatnonzero(distance == distance.min())[-1]])
