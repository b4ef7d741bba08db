"""1:1 comparison: TAR at FAR, DET curve, k-fold accuracy.

Legend: G genuine pairs, I impostor pairs, P pairs in all. A comparison that could not be made has the score -inf: an
impostor pair is then a true reject, a genuine pair a false reject.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.intervals import Interval, bootstrap_tar
from retrieval.metrics.rules import MIN_SUPPORTED, OperatingPoint, Rule, accepts, operating_point

__all__ = [
    "FoldAccuracy",
    "VerificationPoint",
    "VerificationResult",
    "best_accuracy",
    "det_curve",
    "evaluate_pairs",
    "evaluate_verification",
    "kfold_accuracy",
    "pair_scores",
]

_BLOCK_PAIRS = 1 << 16
_KFOLD_THRESHOLDS = np.arange(0, 4, 0.01)


@dataclass(frozen=True)
class VerificationPoint:
    """TAR at one wanted FAR; None with a reason where it does not exist."""

    far: float
    tar: float | None
    reason: str | None
    point: OperatingPoint | None
    interval: Interval | None

    @property
    def is_supported(self) -> bool:
        """At least 30 false accepts stand behind the rate."""
        return self.point is not None and self.point.k >= MIN_SUPPORTED


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
    impostor: NDArray[np.float32]  #: (I,) scores


@dataclass(frozen=True)
class FoldAccuracy:
    """LFW-style accuracy."""

    folds: tuple[float, ...]
    thresholds: tuple[float, ...]  #: squared distance chosen on the other folds
    mean: float
    std: float  #: population


def pair_scores(embeddings: EmbeddingSet, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
    """Cosine of each listed pair of rows, (P,) float32; -inf where a side is not enrolled."""
    unit = embeddings.unit()
    scores = np.empty(len(first), np.float32)
    for start in range(0, len(first), _BLOCK_PAIRS):
        part = slice(start, start + _BLOCK_PAIRS)
        scores[part] = np.einsum("ij,ij->i", unit[first[part]], unit[second[part]])
    scores[~(embeddings.enrolled[first] & embeddings.enrolled[second])] = -np.inf
    return scores


def evaluate_verification(
    embeddings: EmbeddingSet,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]],
    *,
    fars: Sequence[float],
    rule: Rule = "canonical",
    resamples: int = 1000,
) -> VerificationResult:
    """Compare listed pairs of rows.

    Args:
        embeddings: the rows.
        pairs: (P,) index of one side, (P,) of the other, (P,) True for genuine.
        fars: wanted false-accept rates.
        rule: how a rate becomes a threshold.
        resamples: of the bootstrap over subjects; 0 leaves the intervals out.
    """
    first, second, same = pairs
    codes = np.unique(embeddings.subject_ids, return_inverse=True)[1]
    return evaluate_pairs(
        pair_scores(embeddings, first, second),
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
    """Metrics of scored pairs. Arguments as `evaluate_verification`; without `subjects` there are no intervals."""
    genuine, impostor = scores[same], scores[~same]
    missing = "no genuine pairs" if not len(genuine) else "no impostor pairs" if not len(impostor) else None
    intervals: list[Interval | None] = [None] * len(fars)
    if subjects is not None and resamples and missing is None and rule == "canonical":
        first, second = subjects
        intervals = list(
            bootstrap_tar(genuine, first[same], impostor, (first[~same], second[~same]), fars, resamples=resamples)
        )
    points = []
    for far, interval in zip(fars, intervals, strict=True):
        if missing:
            points.append(VerificationPoint(far, None, missing, None, None))
            continue
        point = operating_point(impostor, far, rule=rule, positives=genuine)
        points.append(VerificationPoint(far, float(accepts(genuine, point).mean()), None, point, interval))
    accuracy, threshold = (None, None) if missing else best_accuracy(genuine, impostor)
    return VerificationResult(
        rule=rule,
        num_genuine=len(genuine),
        num_impostor=len(impostor),
        num_failed=int(np.isneginf(scores).sum()),
        points=tuple(points),
        accuracy=accuracy,
        accuracy_threshold=threshold,
        genuine=genuine,
        impostor=impostor,
    )


def best_accuracy(genuine: NDArray[Any], impostor: NDArray[Any]) -> tuple[float, float]:
    """Largest share of right decisions `score > t`, and the first such threshold among the scores."""
    thresholds = np.unique(np.concatenate([genuine, impostor]))
    true = len(genuine) - np.searchsorted(np.sort(genuine), thresholds, side="right")
    rejected = np.searchsorted(np.sort(impostor), thresholds, side="right")
    best = int(np.argmax(true + rejected))
    return float((true[best] + rejected[best]) / (len(genuine) + len(impostor))), float(thresholds[best])


def det_curve(genuine: NDArray[Any], impostor: NDArray[Any], *, points: int = 200) -> tuple[list[float], list[float]]:
    """FMR and FNMR at thresholds spread evenly over the logarithm of the FMR, for plots."""
    counts = np.unique(np.round(np.geomspace(1, len(impostor), points)).astype(np.int64))
    descending = np.sort(impostor)[::-1]
    thresholds = np.append(descending[counts[counts < len(impostor)]], -np.inf)
    fmr = (len(impostor) - np.searchsorted(descending[::-1], thresholds, side="right")) / len(impostor)
    fnmr = np.searchsorted(np.sort(genuine), thresholds, side="right") / len(genuine)
    return fmr.tolist(), fnmr.tolist()


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
