"""1:N search: closed-set ranks and open-set rates, exact to the last tie, in memory bounded by a tile.

Legend: P probes, G gallery entries, D embedding dimension, S subjects in the gallery, L candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.embeddings import EmbeddingSet, concatenate
from retrieval.metrics.intervals import Interval, percentile_interval, resampled_weights, wilson
from retrieval.metrics.rules import (
    MIN_SUPPORTED,
    OperatingPoint,
    Rule,
    accepts,
    allowed_false_positives,
    operating_point,
)
from retrieval.metrics.score_blocks import BlockMaker, Similarity
from retrieval.metrics.search import GallerySearch, RankLevel, largest_impostors, search_gallery

__all__ = ["IdentificationResult", "OpenSetPoint", "StratumResult", "evaluate_identification", "evaluate_searches"]
__all__ += ["identification_by_stratum"]


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
    tpir_enrolled: float | None = None  #: R = 1 over searches in which both sides were enrolled, threshold set on them

    @property
    def is_supported(self) -> bool:
        """At least 30 false alarms stand behind the rate, in every gallery."""
        parts = self.galleries or (self,)
        return all(part.point is not None and part.point.k >= MIN_SUPPORTED for part in parts)

    @property
    def is_extrapolated(self) -> bool:
        """The non-mated searches of some gallery are too few for a single false alarm."""
        return any(part.point is not None and part.point.k == 0 for part in self.galleries or (self,))


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
    mean_average_precision: float | None = None  #: over mated searches, where it was asked for
    precision_interval: Interval | None = None  #: of that mean, by the bootstrap

    def cmc(self, length: int) -> list[float]:
        """CMC(1..length), pooled over galleries."""
        rank = np.concatenate([s.rank[s.is_mated] for s in self.searches])
        return [float((rank <= k).mean()) for k in range(1, length + 1)] if len(rank) else []


def evaluate_identification(
    galleries: Sequence[EmbeddingSet],
    probes: EmbeddingSet,
    *,
    ranks: Sequence[int] = (1, 5, 10, 20),
    fpirs: Sequence[float] = (0.001, 0.01, 0.1),
    candidates: int = 20,
    rank_level: RankLevel = "entry",
    rule: Rule = "canonical",
    similarity: Similarity = "cosine",
    with_average_precision: bool = False,
    resamples: int = 0,
    blocks: BlockMaker | None = None,
) -> IdentificationResult:
    """Search one gallery, or two galleries separately with all probes.

    Args:
        galleries: one or two sets, one embedding a template.
        probes: one embedding a template.
        ranks: k of CMC(k).
        fpirs: wanted false-positive identification rates.
        candidates: L, the list length of the second TPIR.
        rank_level: what counts as a rival.
        rule: how a rate becomes a threshold; `ijb_1n` merges the galleries.
        similarity: what is compared.
        with_average_precision: also TinyFace's AP of every mated search.
        resamples: of the bootstrap over subjects; 0: Wilson intervals, for independent searches.
        blocks: forms the scores (default: NumPy, on the CPU); the result is the same.

    Returns:
        Closed set pooled over galleries; open set per gallery and their unweighted mean.
    """
    if rule == "ijb_1n":
        galleries = [concatenate(galleries)]
    searches = [
        search_gallery(
            gallery,
            probes,
            rank_level=rank_level,
            ties="last_column" if rule == "argsort_rev" else "against_probe",
            similarity=similarity,
            with_average_precision=with_average_precision,
            blocks=blocks,
        )
        for gallery in galleries
    ]
    result = evaluate_searches(
        searches,
        subjects=probes.subject_ids,
        ranks=ranks,
        fpirs=fpirs,
        candidates=candidates,
        rank_level=rank_level,
        rule=rule,
        resamples=resamples,
    )
    if rule == "ijb_1n":
        opened = _pseudo_open_set(galleries[0], probes, searches[0], fpirs, similarity, blocks)
        result = replace(result, open_set=opened)
    failures = [int((~side.enrolled).sum()) for side in (probes, *galleries)]
    return replace(result, num_probe_failures=failures[0], num_gallery_failures=sum(failures[1:]))


def evaluate_searches(
    searches: Sequence[GallerySearch],
    *,
    subjects: NDArray[Any],
    ranks: Sequence[int] = (1, 5, 10, 20),
    fpirs: Sequence[float] = (0.001, 0.01, 0.1),
    candidates: int = 20,
    rank_level: RankLevel = "entry",
    rule: Rule = "canonical",
    resamples: int = 0,
) -> IdentificationResult:
    """Metrics of finished searches, all by the same (P,) probes of `subjects`; other arguments as above."""
    rank = np.concatenate([s.rank[s.is_mated] for s in searches])
    optimistic = np.concatenate([s.optimistic_rank[s.is_mated] for s in searches])
    enrolled = rank[np.isfinite(rank)]
    closed = tuple((k, *_share(int((rank <= k).sum()), len(rank))) for k in ranks)
    means = tuple(_mean([_share(int((s.rank <= k).sum()), int(s.is_mated.sum()))[0] for s in searches]) for k in ranks)
    precisions = [s.average_precision[s.is_mated] for s in searches if s.average_precision is not None]
    open_rule: Rule = "canonical" if rule == "ijb_1n" else rule
    result = IdentificationResult(
        rule=rule,
        rank_level=rank_level,
        candidates=candidates,
        searches=tuple(searches),
        num_mated=len(rank),
        num_non_mated=sum(int((~s.is_mated).sum()) for s in searches),
        num_probe_failures=0,
        num_gallery_failures=0,
        ranks=closed,
        mean_over_galleries=means,
        num_tied=int((rank != optimistic).sum()),
        open_set=tuple(_open_set(searches, fpir, candidates, open_rule) for fpir in fpirs),
        enrolled_ranks=tuple(
            (k, None if rule == "argsort_rev" else _share(int((enrolled <= k).sum()), len(enrolled))[0]) for k in ranks
        ),
        mean_average_precision=float(np.concatenate(precisions).mean()) if precisions and len(rank) else None,
    )
    return _with_bootstrap(result, subjects, resamples) if resamples and rule == "canonical" else result


@dataclass(frozen=True)
class StratumResult:
    """Searches of one stratum of the probes, at thresholds that were set on all of them."""

    stratum: Any
    num_mated: int
    num_non_mated: int
    ranks: tuple[tuple[int, float | None, Interval | None], ...]  #: (k, CMC(k), Wilson interval)
    tpir: tuple[tuple[float | None, Interval | None], ...]  #: per FPIR, R = 1; hits and searches pooled over galleries
    tpir_rank_l: tuple[tuple[float | None, Interval | None], ...]  #: the same with R = L
    fpir: tuple[tuple[float | None, Interval | None], ...]  #: realised in the stratum, pooled over galleries


def identification_by_stratum(result: IdentificationResult, strata: NDArray[Any]) -> list[StratumResult]:
    """Closed and open set by a covariate of the probes.

    Args:
        result: of all probes; its thresholds, one per gallery and FPIR, are kept.
        strata: (P,) the covariate.

    Returns:
        One entry per stratum, sorted.
    """
    found = []
    for stratum in np.unique(strata):
        own = strata == stratum
        rank = np.concatenate([s.rank[own & s.is_mated] for s in result.searches])
        strangers = sum(int((own & ~s.is_mated).sum()) for s in result.searches)
        tpir, listed, fpir = [], [], []
        for point in result.open_set:
            hits = hits_listed = alarms = 0
            for search, part in zip(result.searches, point.galleries or (point,), strict=True):
                if part.point is not None:
                    passed = accepts(search.best, part.point) & np.isfinite(search.best) & own
                    hits += int((passed & search.is_mated & (search.rank <= 1)).sum())
                    hits_listed += int((passed & search.is_mated & (search.rank <= result.candidates)).sum())
                    alarms += int((passed & ~search.is_mated).sum())
            known = point.tpir is not None
            tpir.append(_share(hits, len(rank)) if known else (None, None))
            listed.append(_share(hits_listed, len(rank)) if known else (None, None))
            fpir.append(_share(alarms, strangers) if known else (None, None))
        ranks = tuple((k, *_share(int((rank <= k).sum()), len(rank))) for k, _, _ in result.ranks)
        rates = tuple(tpir), tuple(listed), tuple(fpir)
        found.append(StratumResult(stratum.item(), len(rank), strangers, ranks, *rates))
    return found


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
        tpir_enrolled=_mean([p.tpir_enrolled for p in points]),
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
    enrolled = _tpir_enrolled(search, fpir, rule)
    return OpenSetPoint(fpir, value, value_l, None, point, interval, interval_l, tpir_enrolled=enrolled)


def _tpir_enrolled(search: GallerySearch, fpir: float, rule: Rule) -> float | None:
    """TPIR (R = 1) as if the searches with a side that failed were not listed; None where nothing is left."""
    known = np.isfinite(search.best)
    mated, others = search.best[known & search.is_mated], search.best[known & ~search.is_mated]
    if rule == "argsort_rev" or not len(mated) or not len(others):  # that rule scores failures as 0
        return None
    point = operating_point(others, fpir, rule=rule, positives=mated)
    return float((accepts(mated, point) & (search.rank[known & search.is_mated] <= 1)).mean())


def _pseudo_open_set(
    gallery: EmbeddingSet,
    probes: EmbeddingSet,
    search: GallerySearch,
    fpirs: Sequence[float],
    similarity: Similarity,
    blocks: BlockMaker | None,
) -> tuple[OpenSetPoint, ...]:
    """The closed-set "TPIR" of the rule `ijb_1n`: false alarms among all impostor pairs, counted per probe."""
    mated = search.mated_best
    places = [max(math.ceil(fpir * len(probes)) - 1, 0) for fpir in fpirs]
    count = max(places, default=0) + 1
    top = largest_impostors(gallery, probes, count=count, similarity=similarity, blocks=blocks)
    points = []
    for fpir, place in zip(fpirs, places, strict=True):
        if not len(mated) or not len(top):
            reason = "no mated searches" if not len(mated) else "no impostor pairs"
            points.append(OpenSetPoint(fpir, None, None, reason, None, None, None))
            continue
        threshold = float(top[min(place, len(top) - 1)])
        realised = float((top > threshold).sum()) / len(probes)
        value, interval = _share(int((mated > threshold).sum()), len(mated))
        point = OperatingPoint(threshold, True, place, realised)
        points.append(OpenSetPoint(fpir, value, value, None, point, interval, interval))
    return tuple(points)


def _with_bootstrap(result: IdentificationResult, subjects: NDArray[Any], resamples: int) -> IdentificationResult:
    """The same values with intervals over subjects."""
    names, codes = np.unique(subjects, return_inverse=True)
    weights = resampled_weights(len(names), resamples)
    mated = len(np.unique(np.concatenate([codes[s.is_mated] for s in result.searches])))
    ranks = []
    for k, value, _ in result.ranks:
        hits = sum(weights @ _per_subject(codes, s.is_mated & (s.rank <= k), len(names)) for s in result.searches)
        total = sum(weights @ _per_subject(codes, s.is_mated, len(names)) for s in result.searches)
        with np.errstate(invalid="ignore", divide="ignore"):
            ranks.append((k, value, percentile_interval(np.asarray(hits / total, np.float64), subjects=mated)))
    open_set = []
    for point in result.open_set:
        if point.tpir is None:
            open_set.append(point)
            continue
        values = np.mean(
            [_resampled_tpir(s, codes, weights, point.fpir, result.candidates) for s in result.searches], axis=0
        )
        intervals = [percentile_interval(column, subjects=mated) for column in values.T]
        open_set.append(replace(point, interval=intervals[0], interval_rank_l=intervals[1]))
    precision = _resampled_precision(result.searches, codes, weights) if result.mean_average_precision else None
    return replace(result, ranks=tuple(ranks), open_set=tuple(open_set), precision_interval=precision)


def _resampled_precision(
    searches: Sequence[GallerySearch], codes: NDArray[np.int64], weights: NDArray[np.float32]
) -> Interval | None:
    """Interval of the mean average precision of all mated searches."""
    sums, counts = np.zeros((2, weights.shape[1]))
    for search in searches:
        if search.average_precision is not None:
            own = search.is_mated
            sums += np.bincount(codes[own], search.average_precision[own], minlength=len(sums))
            counts += np.bincount(codes[own], minlength=len(sums))
    with np.errstate(invalid="ignore", divide="ignore"):
        return percentile_interval(np.asarray(weights @ sums / (weights @ counts), np.float64))


def _per_subject(codes: NDArray[np.int64], chosen: NDArray[np.bool_], subjects: int) -> NDArray[np.float32]:
    return np.bincount(codes[chosen], minlength=subjects).astype(np.float32)


def _resampled_tpir(
    search: GallerySearch, codes: NDArray[np.int64], weights: NDArray[np.float32], fpir: float, candidates: int
) -> NDArray[np.float64]:
    """(R, 2) TPIR at rank 1 and within L in each resample, the threshold set anew."""
    others = np.flatnonzero(~search.is_mated)
    others = others[np.argsort(-search.best[others], kind="stable")]
    thresholds = np.append(search.best[others], -np.inf)
    columns = []
    for limit in (1, candidates):
        found = np.flatnonzero(search.is_mated & (search.rank <= limit) & np.isfinite(search.best))
        found = found[np.argsort(-search.best[found], kind="stable")]
        columns.append((codes[found], -search.best[found]))
    mated = _per_subject(codes, search.is_mated, weights.shape[1])
    values = np.full((len(weights), 2), np.nan)
    for row, weight in zip(values, weights, strict=True):
        passed = np.cumsum(weight[codes[others]], dtype=np.float64)
        total = float(weight @ mated)
        if not total or not len(passed) or not passed[-1]:
            continue
        place = int(np.searchsorted(passed, allowed_false_positives(float(passed[-1]), fpir), side="right"))
        for column, (own, descending) in enumerate(columns):
            accepted = int(np.searchsorted(descending, -thresholds[place], side="left"))
            row[column] = float(weight[own[:accepted]].sum(dtype=np.float64)) / total
    return values
