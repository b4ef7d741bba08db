"""Candidate lists in a defined order, whatever an index returns.

An index computes scores in float32 or in a shorter form, and their last bits depend on the batch size and on the
position of an entry: the same two faces may score 0.70000005 and 0.69999999, and entries that tie may come in any order
or be cut off. So its answer is taken as a list of candidates. Their scores are computed again, one row at a time in
float64 and rounded to float32. Where the index promises how far its scores are off, the list is lengthened until no
entry that was left out could belong to it: the search is exact. Where it promises nothing, what it leaves out is lost,
which the recall of the gallery measures.

Legend: P probes, D embedding dimension, K candidates of the index.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.gallery.records import Candidate

__all__ = ["Found", "Request", "Source", "exact_products", "rounding_bound", "search_source"]

_BATCH_PROBES = 1024  # every vector is read once for each batch
_LENGTHENING = 4


@dataclass(frozen=True)
class Found:
    """The entries that an index thinks are nearest."""

    rows: NDArray[np.int64]  #: (P, K) in any order; -1 where there is none
    left_out: NDArray[np.float32]  #: (P,) no entry that is missing has a higher score of the index; -inf: none is
    tolerance: float | None = None  #: bound on the error of its scores, where it is not that of the source


class Source(Protocol):
    """Entries that can be searched. A row is how the source names an entry; rows ascend in the order of enrolment."""

    count: int  #: entries that a search may find
    tolerance: float | None  #: bound on the error of the scores; None: some entries may not be found at all
    max_list: int  #: longest list that it gives

    def first_list(self, top: int) -> int:
        """How many candidates to ask for, for a list of `top`."""

    def nearest(self, probes: NDArray[np.float32], count: int) -> Found:
        """About `count` nearest entries of each (P, D) unit probe."""

    def approximate_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(P, K) inner products with the float32 vectors of the rows, -inf for row -1."""

    def exact_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(P, K) scores by `exact_products`, -inf for row -1."""

    def names(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
        """Entry ids and subject ids of (n,) rows."""


@dataclass(frozen=True)
class Request:
    """What is searched for."""

    top: int | None  #: length of the list; None: as long as candidates score above the threshold
    by_subject: bool = False  #: keep the best entry of each subject
    threshold: float | None = None  #: leave out candidates that do not score higher

    def __post_init__(self) -> None:
        """Refuse a list that holds nobody."""
        if self.top is not None and self.top < 1:
            raise DataError(f"top = {self.top}; a candidate list has at least 1 entry.")


def rounding_bound(dimension: int) -> float:
    """Bound on the difference of two float32 inner products of the same two unit vectors."""
    return 2.0 * (dimension + 2) * float(np.finfo(np.float32).eps)


def exact_products(vectors: NDArray[np.float32], probes: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) inner products of (n, D) vectors and (n, D) probes in float64, rounded to float32.

    Each row is summed alone, so that its score is the same in whatever company it is computed.
    """
    products: NDArray[np.float64] = np.vecdot(vectors, probes, dtype=np.float64)
    return products.astype(np.float32)


def search_source(source: Source, probes: NDArray[np.float32], request: Request) -> list[list[Candidate]]:
    """The candidates of each (P, D) unit probe, best first, equal scores by row.

    Raises:
        DataError: there are more candidates than the source lists.
    """
    batches = np.array_split(probes, max(1, -(-len(probes) // _BATCH_PROBES)))
    return [candidates for batch in batches for candidates in _search_batch(source, batch, request)]


def _search_batch(source: Source, probes: NDArray[np.float32], request: Request) -> list[list[Candidate]]:
    limit = min(source.count, source.max_list)
    wanted = min(limit, source.first_list(request.top or 1))
    lists: dict[int, list[Candidate]] = {}
    unfinished = np.arange(len(probes))
    while len(unfinished):
        near = source.nearest(probes[unfinished], wanted)
        keep = None if request.by_subject or request.top is None else request.top
        rows, scores = _rescored(source, probes[unfinished], near.rows, keep)
        tolerance = source.tolerance if near.tolerance is None else near.tolerance
        open_again = []
        chosen_lists = _chosen(source, rows, scores, request)
        for probe, chosen, left_out in zip(unfinished.tolist(), chosen_lists, near.left_out.tolist(), strict=True):
            if wanted < limit and not _is_complete(chosen, left_out, tolerance, request):
                open_again.append(probe)
                continue
            _check_whole(source, chosen, left_out, request)
            lists[probe] = chosen
        unfinished = np.array(open_again, np.int64)
        wanted = min(limit, _LENGTHENING * wanted)
    return [lists[probe] for probe in range(len(probes))]


def _is_complete(chosen: list[Candidate], left_out: float, tolerance: float | None, request: Request) -> bool:
    """Whether a longer list could not change the answer (or, without a tolerance, is not expected to)."""
    if left_out == -np.inf:
        return True
    if request.threshold is not None and left_out + (tolerance or 0.0) <= request.threshold:
        return True
    if request.top is None or len(chosen) < request.top:
        return False
    return tolerance is None or chosen[request.top - 1].score > left_out + tolerance


def _check_whole(source: Source, chosen: list[Candidate], left_out: float, request: Request) -> None:
    """Refuse to pass off as whole what the longest list of the source cut off.

    A list of the wanted length is whole, but for the order of scores as near to one another as their errors.
    """
    if request.top is not None and len(chosen) >= request.top:
        return
    if not _is_complete(chosen, left_out, source.tolerance, request):
        raise DataError(
            f"A search here lists at most {source.max_list} entries, and {len(chosen)} of them are not all candidates "
            "of a probe. Give a higher threshold or a shorter list (--top), or search a directory on the CPU, which "
            "has no such limit."
        )


def _chosen(
    source: Source, rows: NDArray[np.int64], scores: NDArray[np.float32], request: Request
) -> list[list[Candidate]]:
    """One list for each probe, from rows that are sorted by score."""
    if not request.by_subject:
        rows, scores = rows[:, : request.top], scores[:, : request.top]
    valid = rows >= 0
    if request.threshold is not None:
        valid &= scores > request.threshold
    counts = valid.sum(axis=1)
    entry_ids, subject_ids = source.names(rows[valid])
    kept_scores = scores[valid]
    if request.by_subject:
        firsts = _first_of_subjects(subject_ids, counts, request.top)
        counts = np.array([len(first) for first in firsts], np.int64)
        kept = np.concatenate([np.zeros(0, np.int64), *firsts])
        entry_ids, subject_ids, kept_scores = entry_ids[kept], subject_ids[kept], kept_scores[kept]
    ends = np.cumsum(counts)
    ranks = np.arange(1, len(kept_scores) + 1) - np.repeat(ends - counts, counts)
    columns = zip(entry_ids.tolist(), subject_ids.tolist(), kept_scores.tolist(), ranks.tolist(), strict=True)
    candidates = list(map(Candidate._make, columns))
    return [candidates[start:end] for start, end in pairwise([0, *ends.tolist()])]


def _first_of_subjects(
    subject_ids: NDArray[np.str_], counts: NDArray[np.int64], top: int | None
) -> list[NDArray[np.int64]]:
    """Places of the first entry of each subject, for lists of `counts` entries that lie one after the other."""
    bounds = pairwise([0, *np.cumsum(counts).tolist()])
    firsts = ((start, np.unique(subject_ids[start:end], return_index=True)[1]) for start, end in bounds)
    return [start + np.sort(first)[:top] for start, first in firsts]


def _rescored(
    source: Source, probes: NDArray[np.float32], rows: NDArray[np.int64], top: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows (P, k) and their final scores, best first, equal scores by row; -1 and -inf at the end where there are none.

    With `top`, rows that float32 arithmetic already proves too far away are dropped before the exact pass.
    """
    if top is not None and rows.shape[1] > top + 4:
        rough = source.approximate_scores(probes, rows)
        last = -np.partition(-rough, top - 1, axis=1)[:, top - 1]
        is_near = rough >= (last - 2 * rounding_bound(probes.shape[1]))[:, None]
        rows = np.where(is_near, rows, -1)
        near = max(top, int(is_near.sum(axis=1).max()))
        if near < rows.shape[1]:
            nearest = np.argpartition(-rough, near - 1, axis=1)[:, :near]
            rows = np.take_along_axis(rows, nearest, axis=1)
    scores = source.exact_scores(probes, rows)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
