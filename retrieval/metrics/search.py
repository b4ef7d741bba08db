"""Every probe against a gallery, reduced block by block to best scores and ranks.

Legend: P probes, G gallery entries, S subjects in the gallery, R probes of a block, n pairs of a probe and an entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.score_blocks import BlockMaker, ExactBlock, Sides, Similarity, exact_block, exact_blocks

__all__ = ["GallerySearch", "RankLevel", "Ties", "average_precision", "largest_impostors", "rank_scores"]
__all__ += ["search_gallery"]

RankLevel = Literal["entry", "identity"]
#: against_probe: a rival with an equal score stands before the mate. last_column: the later column stands first, and a
#: template that failed scores 0 (the public evaluators of the PFE family).
Ties = Literal["against_probe", "last_column"]


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
    blocks: BlockMaker | None = None,
) -> GallerySearch:
    """Compare every probe with every gallery entry.

    Scores are float32 values that depend on the two templates alone, so that ties are ties (`score_blocks.py`).

    Args:
        gallery: one embedding a template.
        probes: one embedding a template.
        rank_level: `entry` counts every other entry as a rival, `identity` every other subject by its best entry.
        ties: who wins of equal scores.
        similarity: what is compared.
        with_average_precision: also AP, over entries.
        blocks: forms the scores (default: NumPy, on the CPU); the result is the same.

    Raises:
        DataError: the two sets have different dimensions, or subject ids of different kinds; or there are no variances.
    """
    order = np.argsort(gallery.subject_ids, kind="stable")
    columns = _Columns.of(gallery.subject_ids[order], order)
    sides = Sides(gallery, probes, order, similarity, failed_miss=ties == "against_probe")
    parts = [
        _Ranking.of(block, columns, probes.subject_ids[part], with_average_precision).result(rank_level, ties)
        for part, block in exact_blocks(sides, blocks)
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
    block = exact_block(scores[:, order])
    return _Ranking.of(block, columns, probe_ids, with_average_precision).result(rank_level, ties)


@dataclass(frozen=True)
class _Columns:
    """Gallery entries sorted by subject: the entries of one subject are neighbours."""

    subjects: NDArray[Any]  #: (S,) ascending
    edges: NDArray[np.int64]  #: (S + 1,) first column of each subject
    subject: NDArray[np.int32]  #: (G,) place of each column in `subjects`
    original: NDArray[np.int64]  #: (G,) place of each column in the gallery as given

    @classmethod
    def of(cls, sorted_ids: NDArray[Any], original: NDArray[np.int64]) -> "_Columns":
        subjects, starts, counts = np.unique(sorted_ids, return_index=True, return_counts=True)
        subject = np.repeat(np.arange(len(subjects), dtype=np.int32), counts)
        return cls(subjects, np.append(starts, len(sorted_ids)), subject, original)


@dataclass(frozen=True)
class _Mates:
    """The mates of some probes, probe by probe."""

    rows: NDArray[np.int64]  #: (m,) mated probes, ascending
    starts: NDArray[np.int64]  #: (m + 1,) of each probe in what follows
    columns: NDArray[np.int64]  #: (n,)
    scores: NDArray[np.float32]  #: (n,)

    @classmethod
    def of(cls, block: ExactBlock, columns: _Columns, rows: NDArray[np.int64], place: NDArray[np.int64]) -> "_Mates":
        lows, counts = columns.edges[place], columns.edges[place + 1] - columns.edges[place]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        own = np.arange(starts[-1]) + np.repeat(lows - starts[:-1], counts)
        return cls(rows, starts, own, block.at(np.repeat(rows, counts), own))

    def highest(self, values: NDArray[Any]) -> NDArray[Any]:
        """(m,) highest of the (n,) values of each probe."""
        return np.maximum.reduceat(values, self.starts[:-1]) if len(self.rows) else values


@dataclass(frozen=True)
class _Ranking:
    """Some probes, ready to be ranked."""

    block: ExactBlock
    columns: _Columns
    place: NDArray[np.int64]  #: (R,) of the own subject in `columns.subjects`; -1 where non-mated
    mates: _Mates
    top: NDArray[np.float32]  #: (R,) best mate, -inf where it failed; inf where non-mated
    with_average_precision: bool

    @classmethod
    def of(
        cls, block: ExactBlock, columns: _Columns, probe_ids: NDArray[Any], with_average_precision: bool
    ) -> "_Ranking":
        place = np.minimum(np.searchsorted(columns.subjects, probe_ids), len(columns.subjects) - 1)
        mated = np.flatnonzero(columns.subjects[place] == probe_ids)
        mates = _Mates.of(block, columns, mated, place[mated])
        top, own = np.full(len(probe_ids), np.inf, np.float32), np.full(len(probe_ids), -1, np.int64)
        top[mated], own[mated] = mates.highest(mates.scores), place[mated]
        return cls(block, columns, own, mates, top, with_average_precision)

    def result(self, rank_level: RankLevel, ties: Ties) -> GallerySearch:
        """Count the rivals of every probe."""
        is_mated = self.place >= 0
        best = np.where(is_mated, self.top, -np.inf).astype(np.float32)
        strangers = np.flatnonzero(~is_mated)
        for rows, _, scores in self.block.at_least(strangers, self.block.floors(strangers, 1)):
            np.maximum.at(best, rows, scores)
        found = np.flatnonzero(is_mated & ~np.isneginf(self.top))
        counted = rank_level == "entry" and ties == "against_probe"
        passed = self._passed() if counted or self.with_average_precision else None
        if counted and passed is not None:
            at_top, above = self._counted(*passed)
        else:
            at_top, above = self._listed(found, rank_level, ties)
        missed = np.select([~is_mated, np.isneginf(self.top)], [np.nan, np.inf], 0.0)
        precision = (
            self._precision(passed[0] + passed[1]) if self.with_average_precision and passed is not None else None
        )
        return GallerySearch(is_mated, best, 1 + at_top + missed, 1 + above + missed, precision)

    def _passed(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) entries, mates too, that score higher than a mate, and the same; of all mates, or of one of the best."""
        mates, sizes = self.mates, np.diff(self.mates.starts)
        higher, equal = np.zeros((2, len(mates.scores)), np.int64)
        wanted = ~np.isneginf(mates.scores)
        if not self.with_average_precision:
            wanted &= np.arange(len(wanted)) == np.repeat(self._best_mates, sizes)
        for place in range(int(sizes.max(initial=0))):
            probe = np.flatnonzero(sizes > place)
            entry = mates.starts[probe] + place
            probe, entry = probe[wanted[entry]], entry[wanted[entry]]
            higher[entry], equal[entry] = self.block.higher_and_equal(mates.rows[probe], mates.scores[entry])
        return higher, equal

    @cached_property
    def _is_top(self) -> NDArray[np.bool_]:
        """(n,) whether each mate scores as high as the best one of its probe."""
        mates = self.mates
        is_top: NDArray[np.bool_] = mates.scores == np.repeat(self.top[mates.rows], np.diff(mates.starts))
        return is_top

    @cached_property
    def _best_mates(self) -> NDArray[np.int64]:
        """(m,) of each mated probe the first mate that scores highest, by its place among all mates."""
        mates = self.mates
        places = np.arange(len(mates.scores))
        return -mates.highest(np.where(self._is_top, -places, -len(places)))

    def _counted(
        self, higher: NDArray[np.int64], equal: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(R,) entries of others that score as high as the best mate or higher, and higher; 0 for misses."""
        at_top, above = np.zeros((2, len(self.top)), np.int64)
        mates, best = self.mates, self._best_mates
        own = np.bincount(np.repeat(np.arange(len(best)), np.diff(mates.starts))[self._is_top], minlength=len(best))
        above[mates.rows] = higher[best]
        at_top[mates.rows] = np.where(equal[best] > 0, higher[best] + equal[best] - own, 0)
        return at_top, above

    def _listed(
        self, found: NDArray[np.int64], rank_level: RankLevel, ties: Ties
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same for other rivals and ties, which take the entries one by one."""
        at_top, above = np.zeros((2, len(self.top)), np.int64)
        last_own = self._last_own() if ties == "last_column" else None
        for rows, columns, scores in self.block.at_least(found, self.top[found]):
            subject, is_above = self.columns.subject[columns], scores > self.top[rows]
            is_rival = subject != self.place[rows]
            above += _count(rows, subject, is_rival & is_above, rank_level, len(above))
            if last_own is None:
                at_top += _count(rows, subject, is_rival, rank_level, len(above))
            else:
                later = ~is_above & (self.columns.original[columns] > last_own[rows])
                at_top += np.bincount(rows[later], minlength=len(above))
        return (at_top if last_own is None else at_top + above), above

    def _last_own(self) -> NDArray[np.int64]:
        """(R,) last place, in the gallery as given, of the mates that score highest."""
        mates = self.mates
        last = np.full(len(self.top), -1, np.int64)
        last[mates.rows] = mates.highest(np.where(self._is_top, self.columns.original[mates.columns], -1))
        return last

    def _precision(self, reached: NDArray[np.int64]) -> NDArray[np.float64]:
        """(R,) AP of the mated probes; a rival with an equal score stands before the mate, and no mate that failed.

        Args:
            reached: (n,) entries, mates too, that score as high as a mate or higher.
        """
        found = np.full(len(self.top), np.nan)
        mates = self.mates
        for index, row in enumerate(mates.rows.tolist()):
            own = slice(mates.starts[index], mates.starts[index + 1])
            is_there = ~np.isneginf(mates.scores[own])
            ascending = np.sort(mates.scores[own][is_there])
            among_own = len(ascending) - np.searchsorted(ascending, mates.scores[own][is_there])
            rivals = np.sort(reached[own][is_there] - among_own)  # the better the mate, the fewer its rivals
            found[row] = average_precision((rivals + 1 + np.arange(len(rivals))).tolist(), mates=own.stop - own.start)
        return found


def _count(
    rows: NDArray[np.int64],
    subject: NDArray[np.int32],
    chosen: NDArray[np.bool_],
    rank_level: RankLevel,
    size: int,
) -> NDArray[np.int64]:
    """(R,) chosen pairs of each probe, or the subjects among them; subjects ascend within a probe."""
    rows = rows[chosen]
    if rank_level == "identity" and len(rows):
        subject = subject[chosen]
        is_first = np.append(True, (rows[1:] != rows[:-1]) | (subject[1:] != subject[:-1]))
        rows = rows[is_first]
    return np.bincount(rows, minlength=size)


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
    gallery: EmbeddingSet,
    probes: EmbeddingSet,
    *,
    count: int,
    similarity: Similarity = "cosine",
    blocks: BlockMaker | None = None,
) -> NDArray[np.float32]:
    """The `count` largest scores between different subjects, descending; fewer where there are fewer."""
    subjects, entries = np.unique(gallery.subject_ids, return_counts=True)
    place = np.minimum(np.searchsorted(subjects, probes.subject_ids), len(subjects) - 1)
    mates = np.where(subjects[place] == probes.subject_ids, entries[place], 0)
    top = np.empty(0, np.float32)
    for part, block in exact_blocks(Sides(gallery, probes, np.arange(len(gallery)), similarity), blocks):
        size = part.stop - part.start
        floor = top[-1] if len(top) == count else _impostors_reach(block, size, count, int(mates[part].max()))
        for rows, columns, scores in block.at_least(np.arange(size), np.full(size, floor, np.float32)):
            others = scores[probes.subject_ids[part][rows] != gallery.subject_ids[columns]]
            top = np.concatenate([top, others])
            if len(top) > count:
                top = np.partition(top, len(top) - count)[len(top) - count :]
        top = np.sort(top)[::-1]
    missing = min(count, len(probes) * len(gallery) - int(mates.sum())) - len(top)  # pairs with a side that failed
    return np.append(top, np.full(missing, -np.inf, np.float32))


def _impostors_reach(block: ExactBlock, size: int, count: int, mates: int) -> float:
    """A score that `count` pairs of different subjects reach: every probe has an entry behind its mates."""
    if size < count:
        return -np.inf
    floors = block.floors(np.arange(size), mates + 1)
    return float(np.partition(floors, size - count)[size - count])


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
