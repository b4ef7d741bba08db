"""Every probe against a gallery, reduced tile by tile to best scores and ranks.

Legend: P probes, G gallery entries, D embedding dimension, S subjects in the gallery.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.probabilistic import mutual_likelihood, required_variances

__all__ = [
    "GallerySearch",
    "RankLevel",
    "Similarity",
    "Ties",
    "average_precision",
    "largest_impostors",
    "rank_scores",
    "score_tiles",
    "search_gallery",
]

RankLevel = Literal["entry", "identity"]
#: cosine: of the embeddings. mls: mutual likelihood score of embeddings with variances.
Similarity = Literal["cosine", "mls"]
#: against_probe: a rival with an equal score stands before the mate. last_column: the later column stands first, and a
#: template that failed scores 0 (the public evaluators of the PFE family).
Ties = Literal["against_probe", "last_column"]

#: Elements of the score tile.
_TILE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class GallerySearch:
    """Every probe against one gallery, reduced to what the metrics need. All arrays are (P,)."""

    is_mated: NDArray[np.bool_]  #: the gallery lists the probe's subject, enrolled or not
    best: NDArray[np.float32]  #: mated: highest score of a mate; non-mated: highest score of all; -inf on failure
    rank: NDArray[np.float64]  #: 1 + rivals that score as high or higher; inf for a miss; NaN where non-mated
    optimistic_rank: NDArray[np.float64]  #: 1 + rivals that score higher
    average_precision: NDArray[np.float64] | None = None  #: TinyFace's, NaN where non-mated; only where asked for

    @property
    def mated_best(self) -> NDArray[np.float32]:
        """Scores of the mated searches."""
        return self.best[self.is_mated]

    @property
    def non_mated_best(self) -> NDArray[np.float32]:
        """Highest score of each non-mated search."""
        return self.best[~self.is_mated]


def search_gallery(
    gallery: EmbeddingSet,
    probes: EmbeddingSet,
    *,
    rank_level: RankLevel = "entry",
    ties: Ties = "against_probe",
    similarity: Similarity = "cosine",
    with_average_precision: bool = False,
) -> GallerySearch:
    """Compare every probe with every gallery entry.

    Products are formed in float64 and rounded to float32, so that equal vectors score equally wherever they stand in
    the gallery, and ties are ties.

    Args:
        gallery: one embedding a template.
        probes: one embedding a template.
        rank_level: `entry` counts every other entry as a rival, `identity` every other subject by its best entry.
        ties: who wins of equal scores.
        similarity: what is compared.
        with_average_precision: also AP, over entries.

    Raises:
        DataError: the two sets have different dimensions, or subject ids of different kinds; or there are no variances.
    """
    order = np.argsort(gallery.subject_ids, kind="stable")
    columns = _Columns.of(gallery.subject_ids[order], order)
    parts = [
        _rank_tile(scores, columns, probes.subject_ids[part], rank_level, ties, with_average_precision)
        for part, scores in score_tiles(gallery, probes, order, ties, similarity)
    ]
    return _joined(parts)


def rank_scores(
    scores: NDArray[np.float32],
    gallery_ids: NDArray[Any],
    probe_ids: NDArray[Any],
    *,
    rank_level: RankLevel = "entry",
    ties: Ties = "against_probe",
    with_average_precision: bool = False,
) -> GallerySearch:
    """Ranks from a matrix of scores.

    Args:
        scores: (P, G), larger is more similar, -inf where probe or entry is not enrolled.
        gallery_ids: (G,) subjects the gallery lists; entries may repeat a subject.
        probe_ids: (P,) subjects.
        rank_level: see `search_gallery`, as the others.
        ties: who wins of equal scores.
        with_average_precision: also AP.
    """
    order = np.argsort(gallery_ids, kind="stable")
    columns = _Columns.of(gallery_ids[order], order)
    return _rank_tile(scores[:, order], columns, probe_ids, rank_level, ties, with_average_precision)


@dataclass(frozen=True)
class _Columns:
    """Gallery entries sorted by subject: the entries of one subject are neighbours."""

    subjects: NDArray[Any]  #: (S,) ascending
    edges: NDArray[np.int64]  #: (S + 1,) first column of each subject
    original: NDArray[np.int64]  #: (G,) place of each column in the gallery as given

    @classmethod
    def of(cls, sorted_ids: NDArray[Any], original: NDArray[np.int64]) -> "_Columns":
        subjects, starts = np.unique(sorted_ids, return_index=True)
        return cls(subjects, np.append(starts, len(sorted_ids)), original)


def score_tiles(
    gallery: EmbeddingSet,
    probes: EmbeddingSet,
    order: NDArray[np.int64],
    ties: Ties = "against_probe",
    similarity: Similarity = "cosine",
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """(probes, their scores against the gallery in `order`); -inf where a side is not enrolled."""
    if gallery.embeddings.shape[1] != probes.embeddings.shape[1]:
        raise DataError(
            f"{gallery.name} has embeddings of {gallery.embeddings.shape[1]} dimensions, {probes.name} of "
            f"{probes.embeddings.shape[1]}; they come from different models."
        )
    if (gallery.subject_ids.dtype.kind in "US") != (probes.subject_ids.dtype.kind in "US"):
        raise DataError(
            f"{gallery.name} names subjects by {gallery.subject_ids.dtype}, {probes.name} by "
            f"{probes.subject_ids.dtype}; nobody would be found. Use integers in both, or strings in both."
        )
    gallery_unit, probe_unit = gallery.unit(order), probes.unit()
    if similarity == "mls":
        gallery_variances, probe_variances = required_variances(gallery)[order], required_variances(probes)
    failed = ~gallery.enrolled[order]
    rows = max(1, _TILE_ELEMENTS // len(gallery))
    for start in range(0, len(probes), rows):
        part = slice(start, start + rows)
        if similarity == "mls":
            scores = mutual_likelihood((probe_unit[part], probe_variances[part]), (gallery_unit, gallery_variances))
        else:
            scores = (probe_unit[part] @ gallery_unit.T).astype(np.float32)
        if ties == "against_probe":
            scores[:, failed] = -np.inf
            scores[~probes.enrolled[part]] = -np.inf
        yield part, scores


def _rank_tile(
    scores: NDArray[np.float32],
    columns: _Columns,
    probe_ids: NDArray[Any],
    rank_level: RankLevel,
    ties: Ties,
    with_average_precision: bool,
) -> GallerySearch:
    """Ranks of some probes; the columns of `scores` are those of `columns`."""
    place = np.minimum(np.searchsorted(columns.subjects, probe_ids), len(columns.subjects) - 1)
    is_mated = columns.subjects[place] == probe_ids
    count = len(scores)
    best = np.empty(count, np.float32)
    rank, optimistic, precision = (np.full(count, np.nan) for _ in range(3))
    for row in range(count):
        values = scores[row]
        if not is_mated[row]:
            best[row] = values.max()
            continue
        low, high = columns.edges[place[row]], columns.edges[place[row] + 1]
        mates = values[low:high]
        best[row] = top = mates.max()
        if np.isneginf(top):
            rank[row] = optimistic[row] = np.inf
            precision[row] = 0.0
            continue
        if with_average_precision:
            precision[row] = _row_precision(values, mates)
        if rank_level == "identity":
            values = np.maximum.reduceat(values, columns.edges[:-1])
            mates = values[place[row] : place[row] + 1]
        higher = np.count_nonzero(values > top) - np.count_nonzero(mates > top)
        optimistic[row] = 1 + higher
        if ties == "against_probe":
            rank[row] = 1 + np.count_nonzero(values >= top) - np.count_nonzero(mates >= top)
        else:
            own = columns.original[low + np.flatnonzero(scores[row, low:high] == top)].max()
            rivals = columns.original[np.flatnonzero(scores[row] == top)]
            rank[row] = 1 + higher + int((rivals > own).sum())
    return GallerySearch(is_mated, best, rank, optimistic, precision if with_average_precision else None)


def _row_precision(values: NDArray[np.float32], mates: NDArray[np.float32]) -> float:
    """AP of one probe; a rival with an equal score stands before the mate."""
    descending = np.sort(mates)[::-1]
    at_least = [int(np.count_nonzero(values >= s) - np.count_nonzero(mates >= s)) for s in descending]
    failed = np.isneginf(descending)
    return average_precision(
        [place + rivals for place, (rivals, miss) in enumerate(zip(at_least, failed, strict=True), 1) if not miss],
        mates=len(mates),
    )


def _joined(parts: Sequence[GallerySearch]) -> GallerySearch:
    precisions = [part.average_precision for part in parts if part.average_precision is not None]
    return GallerySearch(
        np.concatenate([part.is_mated for part in parts]),
        np.concatenate([part.best for part in parts]),
        np.concatenate([part.rank for part in parts]),
        np.concatenate([part.optimistic_rank for part in parts]),
        np.concatenate(precisions) if precisions else None,
    )


def largest_impostors(
    gallery: EmbeddingSet, probes: EmbeddingSet, *, count: int, similarity: Similarity = "cosine"
) -> NDArray[np.float32]:
    """The `count` largest scores between different subjects, descending; fewer where there are fewer."""
    top = np.empty(0, np.float32)
    for part, scores in score_tiles(gallery, probes, np.arange(len(gallery)), similarity=similarity):
        scores[probes.subject_ids[part][:, None] == gallery.subject_ids[None, :]] = np.nan
        others = scores[scores >= (top[-1] if len(top) == count else -np.inf)]
        top = np.concatenate([top, others])
        if len(top) > count:
            top = np.partition(top, len(top) - count)[len(top) - count :]
        top = np.sort(top)[::-1]
    return top


def average_precision(mate_ranks: Sequence[int], *, mates: int | None = None) -> float:
    """TinyFace's AP: trapezoids between the precision before and at each mate.

    Args:
        mate_ranks: ranks (from 1, ascending) at which the mates of a probe are listed.
        mates: all mates, also those that failed to enrol; None: as many as there are ranks.

    Returns:
        Mean over mates of (precision at the place before + precision at its rank) / 2, precision 1 before the first.
    """
    if not mate_ranks:
        return 0.0
    total = 0.0
    for found, rank in enumerate(mate_ranks, start=1):
        before = 1.0 if rank == 1 else (found - 1) / (rank - 1)
        total += (before + found / rank) / 2
    return total / (mates or len(mate_ranks))
