"""Scores of probes against a gallery, block by block, the same to the last bit wherever they are computed.

A block of scores answers four questions (`ScoreBlock`). Searches are written in these alone, so that there is one
search, whether NumPy forms the products (`numpy_blocks`) or GPUs do (`device_blocks.py`).

Cosines are formed in float64, in whatever order the hardware likes, and rounded to float32. Two of the same rows differ
by less than `Sides.tolerance`; where that could turn the rounding, the pair is multiplied again, for itself
(`ExactBlock`). So a score depends on its two rows alone: equal vectors tie wherever they stand in the gallery.

Legend: P probes, G gallery entries in the order asked for, D embedding dimension, R probes of a block, n pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.probabilistic import mutual_likelihood, required_variances

__all__ = [
    "BlockMaker",
    "ExactBlock",
    "Pairs",
    "ScoreBlock",
    "Sides",
    "Similarity",
    "exact_block",
    "exact_blocks",
    "groups_of_rows",
    "numpy_blocks",
]

#: cosine: of the embeddings. mls: mutual likelihood score of embeddings with variances.
Similarity = Literal["cosine", "mls"]
#: Rows, columns and scores of n pairs, ascending by row, then column.
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

#: Scores of a block in NumPy.
_BLOCK_ELEMENTS = 1 << 24
#: Pairs that are handed over at a time.
_GROUP_PAIRS = 1 << 20
#: Pairs that are multiplied alone at a time.
_ALONE_PAIRS = 1 << 14
_LOWEST = float(np.finfo(np.float64).min)


class ScoreBlock(Protocol):
    """Scores (R, G) of some probes; -inf where a side failed to enrol and `Sides.failed_miss` holds."""

    def at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) scores of pairs."""

    def highest(self, rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """(n,) the `count`-th highest score of each of these rows, or the lowest where there are fewer."""

    def count(self, rows: NDArray[np.int64], lows: NDArray[np.float64]) -> NDArray[np.int64]:
        """(n,) how many entries score at least the low of their row."""

    def within(self, rows: NDArray[np.int64], lows: NDArray[np.float64], highs: NDArray[np.float64]) -> Iterator[Pairs]:
        """All pairs of ascending rows that score at least the low of their row and below its high, row by row."""


@dataclass(frozen=True)
class Sides:
    """What is compared with what."""

    gallery: EmbeddingSet
    probes: EmbeddingSet
    order: NDArray[np.int64]  #: (G,) row of the gallery in each column
    similarity: Similarity = "cosine"
    failed_miss: bool = True  #: a side that failed to enrol scores -inf; otherwise as the zero vector

    def __post_init__(self) -> None:
        gallery, probes = self.gallery, self.probes
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

    @property
    def tolerance(self) -> float:
        """Bound on the difference of two float64 cosines of the same two rows; 0 for other scores.

        Of it D eps come from the order in which products are summed, (D + 4) eps from the lengths: two rows on two
        devices, each off by (D / 2 + 2) eps / 2.
        """
        dimension = self.gallery.embeddings.shape[1]
        return 2 * (dimension + 2) * float(np.finfo(np.float64).eps) if self.similarity == "cosine" else 0.0

    def alone(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) cosines of probes and columns, each pair summed for itself."""
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _ALONE_PAIRS):
            part = slice(start, start + _ALONE_PAIRS)
            scores[part] = np.vecdot(self.probes.unit(rows[part]), self.gallery.unit(self.order[columns[part]]))
        return scores


#: Forms the scores: the rows of the probes, and their block.
BlockMaker = Callable[[Sides], Iterator[tuple[slice, ScoreBlock]]]


@dataclass(frozen=True)
class ExactBlock:
    """float32 scores of some probes, each a function of its two rows alone."""

    block: ScoreBlock
    tolerance: float
    alone: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]  #: scores of n pairs of the block

    def at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) scores of pairs."""
        return self._rounded(rows, columns, self.block.at(rows, columns))

    def floors(self, rows: NDArray[np.int64], count: int) -> NDArray[np.float32]:
        """(n,) a score that at least `count` entries reach, or all; next to no others do."""
        floors: NDArray[np.float32] = (self.block.highest(rows, count) - self.tolerance).astype(np.float32)
        return floors

    def at_least(
        self, rows: NDArray[np.int64], floors: NDArray[np.float32]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
        """Rows, columns and scores of all pairs of ascending rows that score at least the floor of their row, not -inf.

        They ascend by row, then column, and come in groups of whole rows.
        """
        highs = np.full(len(rows), np.inf)
        for found, columns, values in self.block.within(rows, self._below(floors), highs):
            scores = self._rounded(found, columns, values)
            kept = scores >= floors[np.searchsorted(rows, found)]
            yield found[kept], columns[kept], scores[kept]

    def higher_and_equal(
        self, rows: NDArray[np.int64], levels: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) entries that score above the level of their row, and that score it; the rows ascend.

        Only those that are as near to the level as rounding are looked at one by one.
        """
        beyond = np.nextafter(levels, np.float32(np.inf)).astype(np.float64) + self.tolerance
        higher = self.block.count(rows, beyond)
        equal = np.zeros(len(rows), np.int64)
        for found, columns, values in self.block.within(rows, self._below(levels), beyond):
            scores, place = self._rounded(found, columns, values), np.searchsorted(rows, found)
            higher += np.bincount(place[scores > levels[place]], minlength=len(rows))
            equal += np.bincount(place[scores == levels[place]], minlength=len(rows))
        return higher, equal

    def _below(self, levels: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n,) float64 values that all scores above which round to the levels or higher; never -inf."""
        below = np.nextafter(levels, np.float32(-np.inf)).astype(np.float64)
        lows: NDArray[np.float64] = np.maximum(below - self.tolerance, _LOWEST)
        return lows

    def _rounded(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        scores = values.astype(np.float32)
        if self.tolerance:
            unsure = (values - self.tolerance).astype(np.float32) != (values + self.tolerance).astype(np.float32)
            scores[unsure] = self.alone(rows[unsure], columns[unsure])
        return scores


def exact_blocks(sides: Sides, blocks: "BlockMaker | None" = None) -> Iterator[tuple[slice, ExactBlock]]:
    """The scores of all probes, formed by `blocks` (default: NumPy)."""
    for part, block in (blocks or numpy_blocks)(sides):
        yield part, _exact(sides, part.start, block)


def _exact(sides: Sides, start: int, block: ScoreBlock) -> ExactBlock:
    return ExactBlock(block, sides.tolerance, lambda rows, columns: sides.alone(start + rows, columns))


def exact_block(scores: NDArray[np.float32]) -> ExactBlock:
    """A block of (R, G) scores that are known."""
    return ExactBlock(_NumpyBlock(scores), 0.0, lambda rows, columns: scores[rows, columns])


def numpy_blocks(sides: Sides) -> Iterator[tuple[slice, "_NumpyBlock"]]:
    """Scores by NumPy on the CPU."""
    gallery, probes = sides.gallery, sides.probes
    gallery_unit, probe_unit = gallery.unit(sides.order), probes.unit()
    if sides.similarity == "mls":
        gallery_variances, probe_variances = required_variances(gallery)[sides.order], required_variances(probes)
    failed = ~gallery.enrolled[sides.order]
    size = max(1, _BLOCK_ELEMENTS // len(sides.order))
    for start in range(0, len(probes), size):
        part = slice(start, min(start + size, len(probes)))
        scores: NDArray[np.float64] | NDArray[np.float32]
        if sides.similarity == "mls":
            scores = mutual_likelihood((probe_unit[part], probe_variances[part]), (gallery_unit, gallery_variances))
        else:
            scores = probe_unit[part] @ gallery_unit.T
        if sides.failed_miss:
            scores[:, failed] = -np.inf
            scores[~probes.enrolled[part]] = -np.inf
        yield part, _NumpyBlock(scores)


@dataclass(frozen=True)
class _NumpyBlock:
    """A block that lies in memory."""

    scores: NDArray[np.float64] | NDArray[np.float32]  #: (R, G)

    def at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.scores[rows, columns].astype(np.float64)

    def highest(self, rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        place = self.scores.shape[1] - min(count, self.scores.shape[1])
        if count == 1:
            return np.array([self.scores[row].max() for row in rows.tolist()], np.float64)
        return np.array([np.partition(self.scores[row], place)[place] for row in rows.tolist()], np.float64)

    def count(self, rows: NDArray[np.int64], lows: NDArray[np.float64]) -> NDArray[np.int64]:
        pairs = zip(rows.tolist(), lows, strict=True)  # the lows stay float64: a row of float32 is compared as such
        return np.array([np.count_nonzero(self.scores[row] >= low) for row, low in pairs], np.int64)

    def within(self, rows: NDArray[np.int64], lows: NDArray[np.float64], highs: NDArray[np.float64]) -> Iterator[Pairs]:
        waiting: list[Pairs] = []
        pairs = 0
        for row, low, high in zip(rows.tolist(), lows, highs, strict=True):
            values = self.scores[row]
            columns = np.flatnonzero(values >= low)
            columns = columns[values[columns] < high]
            waiting.append((np.full(len(columns), row), columns, values[columns].astype(np.float64)))
            pairs += len(columns)
            if pairs >= _GROUP_PAIRS:
                yield _concatenated(waiting)
                waiting, pairs = [], 0
        if waiting:
            yield _concatenated(waiting)


def _concatenated(parts: list[Pairs]) -> Pairs:
    rows, columns, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return rows, columns, scores


def groups_of_rows(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Stretches of rows that hold about a million of the (R,) counted pairs, or one row."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _GROUP_PAIRS, side="right")))
        yield slice(start, stop)
        start = stop
