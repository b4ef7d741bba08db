"""The curves of a result record, thinned for plots: errors against thresholds, score histograms, errors by discard.

Everything is lists of numbers that JSON can hold; an infinite threshold is null.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.metrics.edc import edc, partial_area
from retrieval.metrics.rules import MIN_SUPPORTED, allowed_false_positives, operating_point
from retrieval.metrics.search import GallerySearch
from retrieval.metrics.verification import det_curve

__all__ = ["EDC_LIMITS", "det", "discard", "histogram", "identification_errors", "mean_identification_errors"]

#: Shares of discarded comparisons up to which the area under the discard curve is given.
EDC_LIMITS = (0.2, 0.3)
_POINTS = 200
_BINS = 50
_EDC_FARS = (1e-3, 1e-2, 1e-1)


def det(genuine: NDArray[Any], impostor: NDArray[Any]) -> dict[str, Any]:
    """FMR, FNMR and threshold of listed pairs."""
    fmr, fnmr, threshold = det_curve(genuine, impostor, points=_POINTS)
    return {"fmr": fmr, "fnmr": fnmr, "threshold": threshold, "impostors": len(impostor)}


def identification_errors(search: GallerySearch, candidates: int) -> dict[str, Any]:
    """FNIR at rank 1 and within the list, and threshold, against FPIR in one gallery; empty without strangers."""
    non_mated = search.non_mated_best
    if not search.is_mated.any() or not len(non_mated):
        return {"fpir": [], "fnir": [], "fnir_rank_l": [], "threshold": [], "non_mated": len(non_mated)}
    first, listed = _found(search, candidates)
    fpir, fnir, threshold = det_curve(first, non_mated, points=_POINTS)
    _, fnir_l, _ = det_curve(listed, non_mated, points=_POINTS)
    return {
        "fpir": fpir,
        "fnir": fnir,
        "fnir_rank_l": fnir_l,
        "threshold": threshold,
        "non_mated": len(non_mated),
    }


def mean_identification_errors(searches: Sequence[GallerySearch], candidates: int) -> dict[str, Any] | None:
    """Mean over galleries of FNIR at equal FPIR, each at its own threshold; None where a gallery has no curve."""
    if any(not s.is_mated.any() or not len(s.non_mated_best) for s in searches):
        return None
    fewest = min(len(s.non_mated_best) for s in searches)
    rates = np.unique(np.round(np.geomspace(1, fewest, _POINTS))) / fewest
    means = np.zeros((2, len(rates)))
    for search in searches:
        descending = np.append(np.sort(search.non_mated_best)[::-1], -np.inf)
        allowed = [min(allowed_false_positives(len(descending) - 1, rate), len(descending) - 1) for rate in rates]
        for row, scores in zip(means, _found(search, candidates), strict=True):
            row += np.searchsorted(np.sort(scores), descending[allowed], side="right") / len(scores) / len(searches)
    return {"fpir": rates.tolist(), "fnir": means[0].tolist(), "fnir_rank_l": means[1].tolist(), "non_mated": fewest}


def _found(search: GallerySearch, candidates: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores of mates at rank 1 and within the list, -inf where they are not there."""
    mated, rank = search.mated_best, search.rank[search.is_mated]
    floor = np.float32(-np.inf)
    return np.where(rank <= 1, mated, floor), np.where(rank <= candidates, mated, floor)


def histogram(genuine: NDArray[Any], impostor: NDArray[Any]) -> dict[str, Any] | None:
    """Counts of both kinds of scores per bin, and of failed comparisons; None where either kind is absent."""
    kinds = [scores[np.isfinite(scores)] for scores in (genuine, impostor)]
    if not all(map(len, kinds)):
        return None
    low, high = min(float(s.min()) for s in kinds), max(float(s.max()) for s in kinds)
    if low >= -1 and high <= 1 + 1e-6:  # cosines: one axis for all models
        low, high = min(low, 0.0), max(high, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    return {
        "edges": edges.tolist(),
        "genuine": np.histogram(kinds[0], edges)[0].tolist(),
        "impostor": np.histogram(kinds[1], edges)[0].tolist(),
        "failed": [len(genuine) - len(kinds[0]), len(impostor) - len(kinds[1])],
    }


def discard(
    genuine: NDArray[Any], quality: NDArray[Any], impostor: NDArray[Any], *, what: str = "norm"
) -> dict[str, Any]:
    """Error-versus-discard characteristic at a threshold that is set on the impostor pairs.

    The FMR is the smallest of 1e-3, 1e-2 and 1e-1 with 30 false matches behind it, else 1e-1: a function of the set,
    and not of the model.

    Args:
        genuine: (G,) scores.
        quality: (G,) of each pair, the smaller of its two sides.
        impostor: (I,) scores.
        what: name of the quality.
    """
    far = next((f for f in _EDC_FARS if allowed_false_positives(len(impostor), f) >= MIN_SUPPORTED), _EDC_FARS[-1])
    point = operating_point(impostor, far)
    curve = edc(genuine, quality, threshold=point.threshold)
    areas = {f"{limit:g}": partial_area(curve, limit) / limit for limit in EDC_LIMITS}
    places = np.searchsorted([x for x, _ in curve], np.linspace(0, 1, _POINTS), side="right") - 1
    shown = [curve[place] for place in np.unique(np.maximum(places, 0)).tolist()]
    return {
        "discarded": [x for x, _ in shown],
        "fnmr": [y for _, y in shown],
        "area": areas,
        "far": far,
        "supported": point.k >= MIN_SUPPORTED,
        "quality": what,
    }
