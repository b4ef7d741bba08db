"""1:N search: closed-set ranks and open-set rates, exact to the last tie, in memory bounded by a tile.

Legend: P probes, G gallery entries, D embedding dimension, S identities in the gallery.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.intervals import Interval, wilson
from retrieval.metrics.rules import MIN_SUPPORTED, OperatingPoint, Rule, accepts, operating_point

__all__ = [
    "GallerySearch",
    "IdentificationResult",
    "OpenSetPoint",
    "RankLevel",
    "average_precision",
    "evaluate_identification",
    "rank_scores",
    "search_gallery",
]

RankLevel = Literal["entry", "identity"]

#: Elements of the score tile.
_TILE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class GallerySearch:
    """Every probe against one gallery, reduced to what the metrics need. All arrays are (P,)."""

    is_mated: NDArray[np.bool_]  #: the gallery lists the probe's subject, enrolled or not
    best: NDArray[np.float32]  #: mated: highest score of a mate; non-mated: highest score of all; -inf on failure
    rank: NDArray[np.float64]  #: 1 + rivals that score as high or higher; inf for a miss; NaN where non-mated
    optimistic_rank: NDArray[np.float64]  #: 1 + rivals that score higher

    @property
    def mated_best(self) -> NDArray[np.float32]:
        """Scores of the mated searches."""
        return self.best[self.is_mated]

    @property
    def non_mated_best(self) -> NDArray[np.float32]:
        """Highest score of each non-mated search."""
        return self.best[~self.is_mated]


@dataclass(frozen=True)
class OpenSetPoint:
    """TPIR at one wanted FPIR in one gallery, or the mean over galleries; None with a reason where there is none."""

    fpir: float
    tpir: float | None  #: R = 1
    tpir_rank_l: float | None  #: R = L
    reason: str | None
    point: OperatingPoint | None  #: None for a mean: thresholds are never averaged
    interval: Interval | None
    interval_rank_l: Interval | None
    galleries: tuple["OpenSetPoint", ...] = ()  #: what a mean was formed from

    @property
    def is_supported(self) -> bool:
        """At least 30 false alarms stand behind the rate, in every gallery."""
        parts = self.galleries or (self,)
        return all(part.point is not None and part.point.k >= MIN_SUPPORTED for part in parts)


@dataclass(frozen=True)
class IdentificationResult:
    """Closed and open set of one or two galleries."""

    rule: Rule
    rank_level: RankLevel
    candidates: int
    searches: tuple[GallerySearch, ...]
    num_mated: int
    num_non_mated: int
    num_probe_failures: int
    num_gallery_failures: int
    ranks: tuple[tuple[int, float | None, Interval | None], ...]  #: (k, CMC(k) pooled over galleries, interval)
    mean_over_galleries: tuple[float | None, ...]  #: unweighted mean of CMC(k)
    num_tied: int  #: mated searches whose optimistic rank differs
    open_set: tuple[OpenSetPoint, ...]
    enrolled_ranks: tuple[tuple[int, float | None], ...]  #: CMC(k) over searches in which both sides were enrolled

    def cmc(self, length: int) -> list[float]:
        """CMC(1..length), pooled over galleries."""
        rank = np.concatenate([s.rank[s.is_mated] for s in self.searches])
        return [float((rank <= k).mean()) for k in range(1, length + 1)] if len(rank) else []


def search_gallery(gallery: EmbeddingSet, probes: EmbeddingSet, *, rank_level: RankLevel = "entry") -> GallerySearch:
    """Compare every probe with every gallery entry by cosine.

    Products are formed in float64 and rounded to float32, so that equal vectors score equally wherever they stand in
    the gallery, and ties are ties.

    Raises:
        DataError: the two sets have different dimensions, or subject ids of different kinds.
    """
    if gallery.embeddings.shape[1] != probes.embeddings.shape[1]:
        raise DataError(
            f"{gallery.name} has embeddings of {gallery.embeddings.shape[1]} dimensions, {probes.name} of "
            f"{probes.embeddings.shape[1]}; both must come from one model."
        )
    if (gallery.subject_ids.dtype.kind in "iu") != (probes.subject_ids.dtype.kind in "iu"):
        raise DataError(
            f"subject_ids are {gallery.subject_ids.dtype} in {gallery.name} and {probes.subject_ids.dtype} in "
            f"{probes.name}; use integers in both or strings in both."
        )
    gallery_unit, probe_unit = gallery.unit(), probes.unit()
    parts = []
    rows = max(1, _TILE_ELEMENTS // len(gallery))
    for start in range(0, len(probes), rows):
        part = slice(start, start + rows)
        scores = (probe_unit[part] @ gallery_unit.T).astype(np.float32)
        scores[:, ~gallery.enrolled] = -np.inf
        scores[~probes.enrolled[part]] = -np.inf
        parts.append(rank_scores(scores, gallery.subject_ids, probes.subject_ids[part], rank_level=rank_level))
    fields = ("is_mated", "best", "rank", "optimistic_rank")
    return GallerySearch(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def rank_scores(
    scores: NDArray[np.float32], gallery_ids: NDArray[Any], probe_ids: NDArray[Any], *, rank_level: RankLevel = "entry"
) -> GallerySearch:
    """Ranks from a matrix of scores.

    Args:
        scores: (P, G), larger is more similar, -inf where probe or entry is not enrolled.
        gallery_ids: (G,) subjects the gallery lists; entries may repeat a subject.
        probe_ids: (P,) subjects.
        rank_level: `entry` counts every other entry as a rival, `identity` every other subject by its best entry.
    """
    order = np.argsort(gallery_ids, kind="stable")
    subjects, starts = np.unique(gallery_ids[order], return_index=True)
    per_subject = np.maximum.reduceat(scores[:, order], starts, axis=1)
    place = np.minimum(np.searchsorted(subjects, probe_ids), len(subjects) - 1)
    is_mated = subjects[place] == probe_ids
    best = np.where(is_mated, per_subject[np.arange(len(scores)), place], per_subject.max(1))
    rank = np.full(len(scores), np.nan)
    optimistic = np.full(len(scores), np.nan)
    for row in np.flatnonzero(is_mated):
        if np.isneginf(best[row]):
            rank[row] = optimistic[row] = np.inf
            continue
        values = scores[row] if rank_level == "entry" else per_subject[row]
        names = gallery_ids if rank_level == "entry" else subjects
        as_high = values >= best[row]
        mates = names[as_high] == probe_ids[row]
        rank[row] = 1 + np.count_nonzero(~mates)
        optimistic[row] = 1 + np.count_nonzero(values[as_high][~mates] > best[row])
    return GallerySearch(is_mated, best.astype(np.float32), rank, optimistic)


def evaluate_identification(
    galleries: Sequence[EmbeddingSet],
    probes: EmbeddingSet,
    *,
    ranks: Sequence[int] = (1, 5, 10, 20),
    fpirs: Sequence[float] = (0.001, 0.01, 0.1),
    candidates: int = 20,
    rank_level: RankLevel = "entry",
    rule: Rule = "canonical",
) -> IdentificationResult:
    """Search one gallery, or two galleries separately with all probes.

    Args:
        galleries: one or two sets, one embedding a template.
        probes: one embedding a template.
        ranks: k of CMC(k).
        fpirs: wanted false-positive identification rates.
        candidates: L, the list length of the second TPIR.
        rank_level: what counts as a rival.
        rule: how a rate becomes a threshold.

    Returns:
        Closed set pooled over galleries; open set per gallery and their unweighted mean.
    """
    searches = tuple(search_gallery(gallery, probes, rank_level=rank_level) for gallery in galleries)
    rank = np.concatenate([s.rank[s.is_mated] for s in searches])
    optimistic = np.concatenate([s.optimistic_rank[s.is_mated] for s in searches])
    enrolled = rank[np.isfinite(rank)]
    closed = tuple((k, *_share(int((rank <= k).sum()), len(rank))) for k in ranks)
    means = tuple(_mean([_share(int((s.rank <= k).sum()), int(s.is_mated.sum()))[0] for s in searches]) for k in ranks)
    return IdentificationResult(
        rule=rule,
        rank_level=rank_level,
        candidates=candidates,
        searches=searches,
        num_mated=len(rank),
        num_non_mated=sum(int((~s.is_mated).sum()) for s in searches),
        num_probe_failures=int((~probes.enrolled).sum()),
        num_gallery_failures=sum(int((~g.enrolled).sum()) for g in galleries),
        ranks=closed,
        mean_over_galleries=means,
        num_tied=int((rank != optimistic).sum()),
        open_set=tuple(_open_set(searches, fpir, candidates, rule) for fpir in fpirs),
        enrolled_ranks=tuple((k, _share(int((enrolled <= k).sum()), len(enrolled))[0]) for k in ranks),
    )


def _share(hits: int, total: int) -> tuple[float | None, Interval | None]:
    return (hits / total, wilson(hits, total)) if total else (None, None)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if len(present) == len(values) else None


def _open_set(searches: Sequence[GallerySearch], fpir: float, candidates: int, rule: Rule) -> OpenSetPoint:
    points = tuple(_open_set_point(search, fpir, candidates, rule) for search in searches)
    if len(points) == 1:
        return points[0]
    reasons = [p.reason for p in points if p.reason]
    return OpenSetPoint(
        fpir=fpir,
        tpir=_mean([p.tpir for p in points]),
        tpir_rank_l=_mean([p.tpir_rank_l for p in points]),
        reason=reasons[0] if reasons else None,
        point=None,
        interval=None,
        interval_rank_l=None,
        galleries=points,
    )


def _open_set_point(search: GallerySearch, fpir: float, candidates: int, rule: Rule) -> OpenSetPoint:
    mated, non_mated = search.mated_best, search.non_mated_best
    if not len(mated) or not len(non_mated):
        reason = "no mated searches" if not len(mated) else "no non-mated searches"
        return OpenSetPoint(fpir, None, None, reason, None, None, None)
    point = operating_point(non_mated, fpir, rule=rule, positives=mated)
    # The published 1:N evaluator of this rule wants the mate strictly on top; the others share the pessimistic rank.
    accepted = accepts(mated, point) & np.isfinite(mated)
    rank = search.rank[search.is_mated]
    first, listed = int((accepted & (rank <= 1)).sum()), int((accepted & (rank <= candidates)).sum())
    value, interval = _share(first, len(mated))
    value_l, interval_l = _share(listed, len(mated))
    return OpenSetPoint(fpir, value, value_l, None, point, interval, interval_l)


def average_precision(mate_ranks: Sequence[int]) -> float:
    """TinyFace's AP: trapezoids between the precision before and at each mate.

    Args:
        mate_ranks: ranks (from 1, ascending) at which the mates of a probe are listed.

    Returns:
        Mean over mates of (precision at the place before + precision at its rank) / 2, precision 1 before the first.
    """
    if not mate_ranks:
        return 0.0
    total = 0.0
    for found, rank in enumerate(mate_ranks, start=1):
        before = 1.0 if rank == 1 else (found - 1) / (rank - 1)
        total += (before + found / rank) / 2
    return total / len(mate_ranks)
