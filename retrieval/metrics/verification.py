"""1:1 comparison: TAR at FAR, DET curve, k-fold accuracy.

Legend: G genuine pairs, I impostor pairs, P pairs in all. A comparison that could not be made has the score -inf: an
impostor pair is then a true reject, a genuine pair a false reject.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.intervals import Interval, bootstrap_tar, wilson
from retrieval.metrics.rules import MIN_SUPPORTED, OperatingPoint, Rule, accepts, operating_points
from retrieval.metrics.score_blocks import Similarity
from retrieval.probabilistic import mutual_likelihood_of_pairs, required_variances

__all__ = [
    "FoldAccuracy",
    "VerificationPoint",
    "VerificationResult",
    "area_under_roc",
    "best_accuracy",
    "det_curve",
    "evaluate_pairs",
    "evaluate_verification",
    "kfold_accuracy",
    "pair_scores",
    "rates_by_stratum",
]

_BLOCK_PAIRS = 1 << 16
#: Scores of one block of the product of all sides with all sides, and how many of them may go unused per listed pair.
_BLOCK_SCORES, _MAX_UNUSED = 1 << 24, 16
_KFOLD_THRESHOLDS = np.arange(0, 4, 0.01)


@dataclass(frozen=True)
class VerificationPoint:
    """TAR at one wanted FAR; None with a reason where it does not exist."""

    far: float
    tar: float | None
    reason: str | None
    point: OperatingPoint | None
    interval: Interval | None
    tar_enrolled: float | None = None  #: of the pairs with both sides enrolled, at a threshold set on such pairs

    @property
    def is_supported(self) -> bool:
        """At least 30 false accepts stand behind the rate."""
        return self.point is not None and self.point.k >= MIN_SUPPORTED

    @property
    def is_extrapolated(self) -> bool:
        """The pairs are too few for a single false accept."""
        return self.point is not None and self.point.k == 0


@dataclass(frozen=True)
class VerificationResult:
    """All that one list of pairs gives."""

    rule: Rule
    num_genuine: int
    num_impostor: int
    num_failed: int  #: pairs with a side that failed to enrol
    points: tuple[VerificationPoint, ...]
    accuracy: float | None  #: best share of right decisions over all thresholds (optimistic: chosen on the test pairs)
    accuracy_threshold: float | None
    genuine: NDArray[np.float32]  #: (G,) scores
    impostor: NDArray[np.float32]  #: (I,) scores, ascending


@dataclass(frozen=True)
class FoldAccuracy:
    """LFW-style accuracy."""

    folds: tuple[float, ...]
    thresholds: tuple[float, ...]  #: squared distance chosen on the other folds
    mean: float
    std: float  #: population


def pair_scores(
    embeddings: EmbeddingSet,
    first: NDArray[np.integer[Any]],
    second: NDArray[np.integer[Any]],
    *,
    similarity: Similarity = "cosine",
) -> NDArray[np.float32]:
    """Similarity of each listed pair of rows, (P,) float32; -inf where a side is not enrolled.

    Rows that occur in many pairs are multiplied block by block, which reads each of them once; scattered pairs one by
    one. Products are formed in float64 and rounded once, so both ways give equal scores.
    """
    enrolled = embeddings.enrolled
    if similarity == "mls":
        return _likelihoods(embeddings, first, second)
    (left, left_place), (right, right_place) = _distinct(first, len(embeddings)), _distinct(second, len(embeddings))
    scores = np.empty(len(first), np.float32)
    if len(left) * len(right) > _MAX_UNUSED * len(first):
        unit = embeddings.unit()
        for start in range(0, len(first), _BLOCK_PAIRS):
            part = slice(start, start + _BLOCK_PAIRS)
            scores[part] = np.einsum("ij,ij->i", unit[first[part]], unit[second[part]])
    else:
        sides = embeddings.take(left).unit(), embeddings.take(right).unit()
        _block_scores(*sides, left_place, right_place, scores)
    scores[~(enrolled[first] & enrolled[second])] = -np.inf
    return scores


def _likelihoods(
    embeddings: EmbeddingSet, first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    unit, variances = embeddings.unit(), required_variances(embeddings)
    scores = np.empty(len(first), np.float32)
    for start in range(0, len(first), _BLOCK_PAIRS // 8):
        one, other = (side[start : start + _BLOCK_PAIRS // 8] for side in (first, second))
        scores[start : start + len(one)] = mutual_likelihood_of_pairs(
            (unit[one], variances[one]), (unit[other], variances[other])
        )
    scores[~(embeddings.enrolled[first] & embeddings.enrolled[second])] = -np.inf
    return scores


def _distinct(rows: NDArray[np.integer[Any]], size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The distinct rows, ascending, and the place of each row among them."""
    is_there = np.zeros(size, bool)
    is_there[rows] = True
    place = np.cumsum(is_there, dtype=np.int32) - 1
    return np.flatnonzero(is_there), place[rows]


def _block_scores(
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    left_place: NDArray[np.int32],
    right_place: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> None:
    rows = max(1, _BLOCK_SCORES // len(right))
    order = np.argsort(left_place, kind="stable") if np.any(np.diff(left_place) < 0) else None
    sorted_place = left_place if order is None else left_place[order]
    starts = np.arange(0, len(left), rows)
    edges = np.searchsorted(sorted_place, np.append(starts, len(left)))
    for start, low, high in zip(starts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        block = (left[start : start + rows] @ right.T).astype(np.float32)
        pairs = slice(low, high) if order is None else order[low:high]
        scores[pairs] = block[left_place[pairs] - start, right_place[pairs]]


def evaluate_verification(
    embeddings: EmbeddingSet,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]],
    *,
    fars: Sequence[float],
    rule: Rule = "canonical",
    similarity: Similarity = "cosine",
    resamples: int = 1000,
) -> VerificationResult:
    """Compare listed pairs of rows.

    Args:
        embeddings: the rows.
        pairs: (P,) index of one side, (P,) of the other, (P,) True for genuine.
        fars: wanted false-accept rates.
        rule: how a rate becomes a threshold.
        similarity: what is compared.
        resamples: of the bootstrap over subjects; 0: Wilson intervals, as of independent pairs.
    """
    first, second, same = pairs
    codes = np.unique(embeddings.subject_ids, return_inverse=True)[1]
    return evaluate_pairs(
        pair_scores(embeddings, first, second, similarity=similarity),
        same,
        fars=fars,
        rule=rule,
        subjects=(codes[first], codes[second]),
        resamples=resamples,
    )


def evaluate_pairs(
    scores: NDArray[np.float32],
    same: NDArray[np.bool_],
    *,
    fars: Sequence[float],
    rule: Rule = "canonical",
    subjects: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    resamples: int = 1000,
) -> VerificationResult:
    """Metrics of scored pairs. Arguments as `evaluate_verification`; without `subjects` Wilson intervals."""
    genuine, impostor = scores[same], scores[~same]
    ascending = np.sort(impostor)
    missing = "no genuine pairs" if not len(genuine) else "no impostor pairs" if not len(impostor) else None
    intervals: list[Interval | None] = [None] * len(fars)
    if subjects is not None and resamples and missing is None and rule == "canonical":
        first, second = subjects
        intervals = bootstrap_tar(
            genuine, first[same], impostor, (first[~same], second[~same]), fars, resamples=resamples
        )
    points: list[VerificationPoint] = []
    if missing:
        points = [VerificationPoint(far, None, missing, None, None) for far in fars]
    else:
        found = operating_points(ascending, fars, rule=rule, positives=genuine, is_sorted=True)
        enrolled = _tar_enrolled(genuine, ascending, fars, rule, found)
        for far, point, interval, other in zip(fars, found, intervals, enrolled, strict=True):
            hits = int((accepts(genuine, point) & np.isfinite(genuine)).sum())  # a failure is none, whatever the rule
            interval = interval or wilson(hits, len(genuine))
            points.append(VerificationPoint(far, hits / len(genuine), None, point, interval, other))
    accuracy, threshold = (None, None) if missing else best_accuracy(genuine, ascending, is_sorted=True)
    return VerificationResult(
        rule=rule,
        num_genuine=len(genuine),
        num_impostor=len(impostor),
        num_failed=int(np.isneginf(scores).sum()),
        points=tuple(points),
        accuracy=accuracy,
        accuracy_threshold=threshold,
        genuine=genuine,
        impostor=ascending,
    )


def _tar_enrolled(
    genuine: NDArray[np.float32],
    ascending: NDArray[np.float32],
    fars: Sequence[float],
    rule: Rule,
    points: list[OperatingPoint],
) -> list[float | None]:
    """TAR at each FAR as if the pairs that could not be compared were not listed; None where nothing is left.

    `points` are those of all pairs, which stand where none failed.
    """
    known = genuine[np.isfinite(genuine)]
    others = ascending[np.searchsorted(ascending, -np.inf, side="right") :]
    if not len(known) or not len(others):
        return [None] * len(fars)
    if len(others) < len(ascending) or len(known) < len(genuine):
        points = operating_points(others, fars, rule=rule, positives=known, is_sorted=True)
    return [float(accepts(known, point).mean()) for point in points]


def rates_by_stratum(
    scores: NDArray[np.float32], codes: NDArray[np.integer[Any]], names: Sequence[Any], point: OperatingPoint
) -> list[tuple[Any, int, float, Interval]]:
    """Share of accepted pairs in each stratum of a covariate, all with one threshold.

    Args:
        scores: (P,) of genuine pairs, for TAR, or of impostor pairs, for FMR.
        codes: (P,) index into `names`, the stratum of each pair.
        names: of the strata.
        point: threshold, set on all impostor pairs.

    Returns:
        (name, pairs, share, Wilson interval) of the strata that have pairs.
    """
    accepted = accepts(scores, point)
    totals = np.bincount(codes, minlength=len(names)).tolist()
    hits = np.bincount(codes[accepted], minlength=len(names)).tolist()
    return [
        (name, total, hit / total, wilson(hit, total))
        for name, total, hit in zip(names, totals, hits, strict=True)
        if total
    ]


def area_under_roc(genuine: NDArray[Any], impostor: NDArray[Any]) -> float:
    """Probability that a genuine score is above an impostor score; ties count half."""
    ascending = np.sort(impostor)
    below = np.searchsorted(ascending, genuine, side="left").astype(np.float64)
    below += np.searchsorted(ascending, genuine, side="right")
    return float(below.mean() / (2 * len(impostor)))


def best_accuracy(genuine: NDArray[Any], impostor: NDArray[Any], *, is_sorted: bool = False) -> tuple[float, float]:
    """Largest share of right decisions `score > t`, and the first such threshold among the scores.

    Only thresholds just below a genuine score can be best: the largest score of any kind below it. -inf, which accepts
    every comparison that could be made, is the answer where it is better than all of these.

    Args:
        genuine: (G,) scores.
        impostor: (I,) scores.
        is_sorted: the impostor scores ascend already.
    """
    mated, other = np.unique(genuine), impostor if is_sorted else np.sort(impostor)
    below = np.searchsorted(other, mated, side="left")
    nearest = np.where(below > 0, other[np.maximum(below - 1, 0)], -np.inf)
    previous = np.append(-np.inf, mated[:-1])
    last = max(float(mated[-1]), float(other[-1]))
    thresholds = np.append(np.maximum(nearest, previous), last)
    thresholds[0] = max(float(thresholds[0]), float(min(mated[0], other[0])))
    thresholds = thresholds.astype(other.dtype)
    true = len(genuine) - np.searchsorted(np.sort(genuine), thresholds, side="right")
    rejected = np.searchsorted(other, thresholds, side="right")
    best = int(np.argmax(true + rejected))
    right, threshold = int(true[best] + rejected[best]), float(thresholds[best])
    right_of_all = int((genuine > -np.inf).sum() + np.searchsorted(other, -np.inf, side="right"))
    if right_of_all > right:
        right, threshold = right_of_all, -math.inf
    return right / (len(genuine) + len(other)), threshold


def det_curve(
    genuine: NDArray[Any], impostor: NDArray[Any], *, points: int = 200
) -> tuple[list[float], list[float], list[float | None]]:
    """FMR, FNMR and their thresholds, spread evenly over the logarithm of the FMR, for plots; None accepts all."""
    counts = np.unique(np.round(np.geomspace(1, len(impostor), points)).astype(np.int64))
    descending = np.sort(impostor)[::-1]
    thresholds = np.append(descending[counts[counts < len(impostor)]], -np.inf)
    fmr = (len(impostor) - np.searchsorted(descending[::-1], thresholds, side="right")) / len(impostor)
    fnmr = np.searchsorted(np.sort(genuine), thresholds, side="right") / len(genuine)
    shown = [value if np.isfinite(value) else None for value in thresholds.tolist()]
    return fmr.tolist(), fnmr.tolist(), shown


def kfold_accuracy(distances: NDArray[Any], same: NDArray[np.bool_], *, folds: int = 10) -> FoldAccuracy:
    """LFW accuracy: threshold on the squared distance chosen on the other folds, accuracy on the held-out one.

    Args:
        distances: (P,) squared Euclidean distances of unit vectors; same iff distance < t, t in 0, 0.01, ..., 3.99.
        same: (P,) True for genuine.
        folds: contiguous, not shuffled.
    """
    right = (distances[None, :] < _KFOLD_THRESHOLDS[:, None]) == same[None, :]
    accuracies, thresholds = [], []
    for held_out in np.array_split(np.arange(len(distances)), folds):
        others = np.ones(len(distances), bool)
        others[held_out] = False
        best = int(right[:, others].mean(1).argmax())
        thresholds.append(float(_KFOLD_THRESHOLDS[best]))
        accuracies.append(float(right[best, held_out].mean()))
    return FoldAccuracy(tuple(accuracies), tuple(thresholds), float(np.mean(accuracies)), float(np.std(accuracies)))
