"""What a gallery on this machine searches: every vector one by one, a Faiss index, or pooled templates."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery.bfloat16 import nearest_rows_bfloat16, pays
from retrieval.gallery.clusters import Clusters
from retrieval.gallery.search import Found, exact_products, rounding_bound
from retrieval.gallery.segments import Entries, Rows

__all__ = ["FlatSource", "IndexedSource", "PooledSource", "TrackedIndex"]

_EXTRA_CANDIDATES = 8
_REMOVED_PLACES = 256
_POOLED_BLOCK_ROWS = 1 << 12
_EXACT_ELEMENTS = 1 << 15  # 256 KiB of float64, with as much of probes: stays in the second-level cache
_BLAS_PROBES, _BLAS_PROBES_ONCE = 3, 20


class _LocalSource:
    """Vectors and names that lie on this machine."""

    max_list = 1 << 40

    def __init__(self, rows: Rows, entries: Entries) -> None:
        self.rows = rows
        self.count = len(rows)
        self._entries = entries

    def approximate_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Source`. Faiss reads the vectors where they lie, without a copy of them."""
        import faiss

        probes = np.ascontiguousarray(probes)

        def products(
            part: NDArray[np.float32], local: NDArray[np.int64], probe_of: NDArray[np.int64]
        ) -> NDArray[np.float32]:
            scores = np.empty(len(local), np.float32)
            faiss.pairwise_indexed_inner_product(  # type: ignore[attr-defined]  # exported at run time
                probes.shape[1],
                len(local),
                faiss.swig_ptr(probes),
                faiss.swig_ptr(probe_of),
                faiss.swig_ptr(part),
                faiss.swig_ptr(local),
                faiss.swig_ptr(scores),
            )
            return scores

        return self._scored(rows, max(1, rows.size), products)

    def exact_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Source`."""

        def products(
            part: NDArray[np.float32], local: NDArray[np.int64], probe_of: NDArray[np.int64]
        ) -> NDArray[np.float32]:
            return exact_products(part[local], probes[probe_of])

        return self._scored(rows, max(1, _EXACT_ELEMENTS // probes.shape[1]), products)

    def _scored(
        self,
        rows: NDArray[np.int64],
        size: int,
        products: Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """(P, K) scores, -inf for row -1; vectors are read in the order in which they lie.

        Args:
            rows: (P, K) of every probe.
            size: rows at a time.
            products: scores of (n,) rows of a part with the (n,) probes of those numbers.
        """
        order = np.argsort(rows, axis=None)
        wanted, probe_of = rows.ravel()[order], order // max(1, rows.shape[1])
        scores = np.full(rows.size, -np.inf, np.float32)
        bounds = np.searchsorted(wanted, self.rows.starts).tolist()
        for part, start, (first, last) in zip(self.rows.parts, self.rows.starts, pairwise(bounds), strict=False):
            for begin in range(first, last, size):
                piece = slice(begin, min(begin + size, last))
                scores[order[piece]] = products(part, wanted[piece] - start, probe_of[piece])
        return scores.reshape(rows.shape)

    def names(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
        """See `Source`."""
        return self._entries.entry_ids[rows], self._entries.subject_ids[rows]


class FlatSource(_LocalSource):
    """Every vector compared in float32, read through the memory map: exact."""

    def __init__(self, rows: Rows, entries: Entries) -> None:
        super().__init__(rows, entries)
        self.tolerance: float | None = rounding_bound(rows.dimension)

    def first_list(self, top: int) -> int:
        """See `Source`."""
        return top + _EXTRA_CANDIDATES

    def nearest(self, probes: NDArray[np.float32], count: int) -> Found:
        """See `Source`."""
        if pays(len(probes), len(self.rows)):
            return nearest_rows_bfloat16(self.rows, probes, count)
        return nearest_rows(self.rows, probes, count)


def use_blas_early(dimension: int) -> None:
    """Let Faiss compare by matrix products from three probes on; of itself it begins at 250 (D = 512).

    Below, it reads every vector once for each probe: 128 probes take 15 times as long. The setting is one of the whole
    process, of Faiss 1.12 and later; earlier ones count probes and begin at 20.
    """
    import faiss

    if faiss.cvar.distance_compute_blas_threshold > _BLAS_PROBES_ONCE:
        faiss.cvar.distance_compute_blas_threshold = _BLAS_PROBES * dimension


def nearest_rows(rows: Rows, probes: NDArray[np.float32], count: int) -> Found:
    """The `count` nearest rows of each probe by float32 inner product."""
    import faiss

    use_blas_early(probes.shape[1])
    probes = np.ascontiguousarray(probes)
    count = min(count, len(rows))
    heap = faiss.ResultHeap(len(probes), count, keep_max=True)
    for part, start in zip(rows.parts, rows.starts, strict=False):
        scores, near = faiss.knn(probes, part, min(count, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, near + start)
    heap.finalize()
    left_out = heap.D[:, -1] if count < len(rows) else np.full(len(probes), -np.inf, np.float32)
    return Found(heap.I, left_out)


class TrackedIndex:
    """An index, of Faiss or with the same `search`, the numbers of the entries in it, and how it is searched.

    Args:
        index: what `search` is called on.
        numbers: (n,) number of the entry at each place of the index.
        candidates: how many to rescore for each wanted one.
        least: how many to rescore at least.
        tolerance: bound on the error of its scores; None for an approximate index.
        max_list: longest list that it gives.
        clusters: of the index, where they may be chosen here.
        has_one_user: whether only one thread may search it at one time, as on GPUs; the others wait.
        keep: what has to live as long as the index.
    """

    def __init__(
        self,
        index: Any,
        numbers: NDArray[np.int64],
        *,
        candidates: int,
        least: int,
        tolerance: float | None = None,
        max_list: int = 1 << 40,
        clusters: Clusters | None = None,
        has_one_user: bool = False,
        keep: Any = None,
    ) -> None:
        self.keep = keep
        self._turn: AbstractContextManager[Any] = threading.Lock() if has_one_user else nullcontext()
        self.index = index
        self.numbers = numbers
        self.candidates = candidates
        self.least = least
        self.tolerance = tolerance
        self.max_list = max_list
        self._clusters = clusters

    def search(self, probes: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(P, count) scores and places of about the nearest entries of each (P, D) probe, best first; -1: no more."""
        searched = self._clusters or self.index
        with self._turn:
            scores, places = searched.search(np.ascontiguousarray(probes), count)
        return scores, places


class IndexedSource(_LocalSource):
    """An index, and one by one what was enrolled after it was made.

    Args:
        rows: all vectors.
        entries: all entries.
        tracked: the index.
        until: entries with this number or a higher one are not in it.
    """

    def __init__(self, rows: Rows, entries: Entries, tracked: TrackedIndex, until: int) -> None:
        super().__init__(rows, entries)
        self.tolerance = tracked.tolerance
        self.max_list = tracked.max_list
        self._tracked = tracked
        self._tail_start = int(np.searchsorted(entries.numbers, until))
        self._tail = rows.from_row(self._tail_start)
        self._row_of = _rows_of_numbers(tracked.numbers, entries.numbers)
        self._removed = len(tracked.numbers) - self._tail_start

    def first_list(self, top: int) -> int:
        """See `Source`."""
        if self.tolerance is not None:
            return top + self._tracked.least
        return max(self._tracked.least, self._tracked.candidates * top)

    def nearest(self, probes: NDArray[np.float32], count: int) -> Found:
        """See `Source`."""
        total = len(self._tracked.numbers)
        # Removed entries still take places in the list of the index.
        asked = total if count >= self.count else min(total, count + min(self._removed, max(count, _REMOVED_PLACES)))
        asked = min(asked, self.max_list)
        use_blas_early(probes.shape[1])
        scores, places = self._tracked.search(probes, asked)
        rows = self._row_of[places]  # place -1 is the last element, which is -1
        left_out = np.where((places[:, -1] >= 0) & (asked < total), scores[:, -1], -np.inf).astype(np.float32)
        if len(self._tail):
            tail = nearest_rows(self._tail, probes, count)
            rows = np.concatenate([rows, tail.rows + self._tail_start], axis=1)
            left_out = np.maximum(left_out, tail.left_out)
        return Found(rows, left_out)


def _rows_of_numbers(indexed: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n + 1,) row of each indexed entry, -1 where it has been removed; one more -1 at the end."""
    rows = np.full(len(indexed) + 1, -1, np.int64)
    if len(numbers):
        place = np.minimum(np.searchsorted(numbers, indexed), len(numbers) - 1)
        rows[:-1] = np.where(numbers[place] == indexed, place, -1)
    return rows


class PooledSource(FlatSource):
    """One vector per subject: the sum of its embeddings at their enrolled length, scaled to length 1."""

    def __init__(self, rows: Rows, entries: Entries) -> None:
        subjects, first, codes = np.unique(entries.subject_ids, return_index=True, return_inverse=True)
        sums = np.zeros((len(subjects), rows.dimension), np.float64)
        for part, block in _numbered(rows.blocks(_POOLED_BLOCK_ROWS)):
            np.add.at(sums, codes[part], block.astype(np.float64) * entries.norms[part, None])
        lengths = np.linalg.norm(sums, axis=1)
        kept = np.flatnonzero(lengths > 0)
        kept = kept[np.argsort(first[kept])]  # ties go to the subject that was enrolled first
        templates = (sums[kept] / lengths[kept, None]).astype(np.float32)
        names = np.zeros(len(kept), "U1")
        pooled = Entries(names, subjects[kept], lengths[kept].astype(np.float32), np.arange(len(kept)))
        super().__init__(Rows([templates] if len(kept) else [], rows.dimension), pooled)


def _numbered(blocks: Iterator[NDArray[np.float32]]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    start = 0
    for block in blocks:
        yield slice(start, start + len(block)), block
        start += len(block)
