"""A collection of Milvus as something that can be searched: its answers, with the vectors to compare them again."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery.milvus_kinds import Effort
from retrieval.gallery.search import Found, exact_products, rounding_bound
from retrieval.gallery.segments import Entries, Rows
from retrieval.gallery.sources import PooledSource

__all__ = ["FIELDS", "MAX_LIST", "MilvusSource", "among", "pooled_source", "stored_entries"]

#: Longest list that Milvus gives.
MAX_LIST = 16384
FIELDS = ("entry_id", "subject_id", "norm", "number", "embedding")
_QUERY_ROWS = 1000
_ASKED_IDS = MAX_LIST  # at a time; with ids of 512 bytes, 8 MB of the 64 that a server takes
_ANSWER_BYTES = 16 << 20  # of vectors in one answer; servers send 100 MB at most


class MilvusSource:
    """Entries of a collection; a row is the number that an entry was given when it was enrolled.

    Args:
        client: `pymilvus.MilvusClient`.
        collection: its name.
        dimension: D.
        count: entries in it.
        effort: how much of its index is looked at.
        where: Milvus filter expression; "" for all entries.
        consistency: Milvus consistency level.
    """

    max_list = MAX_LIST

    def __init__(
        self, client: Any, collection: str, dimension: int, count: int, *, effort: Effort, where: str, consistency: str
    ) -> None:
        self.count = count
        self.tolerance: float | None = rounding_bound(dimension) if effort.kind == "flat" else None
        self._client = client
        self._collection = collection
        self._dimension = dimension
        self._where = where
        self._consistency = consistency
        self._effort = effort
        self._names: dict[int, tuple[str, str]] = {}
        self._scores: list[dict[int, float]] = []  # of each probe of the last answer, by number

    def first_list(self, top: int) -> int:
        """See `Source`."""
        return self._effort.first_list(top)

    def nearest(self, probes: NDArray[np.float32], count: int) -> Found:
        """See `Source`. Scores are computed at once, and the vectors let go."""
        self._names, self._scores = {}, []
        rows = np.full((len(probes), count), -1, np.int64)
        left_out = np.full(len(probes), -np.inf, np.float32)
        for place, hits in enumerate(self._answers(probes, count)):
            vectors = np.array([hit["entity"]["embedding"] for hit in hits], np.float32).reshape(-1, self._dimension)
            numbers = [int(hit["entity"]["number"]) for hit in hits]
            scores = exact_products(vectors, probes[[place] * len(hits)])
            self._scores.append(dict(zip(numbers, scores.tolist(), strict=True)))
            for number, hit in zip(numbers, hits, strict=True):
                self._names[number] = (str(hit["entity"]["entry_id"]), str(hit["entity"]["subject_id"]))
            rows[place, : len(hits)] = numbers
            if len(hits) == count and count < self.count:
                left_out[place] = hits[-1]["distance"]
        return Found(rows, left_out)

    def approximate_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Source`."""
        return self.exact_scores(probes, rows)  # at hand

    def exact_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Source`. The probes are those of the last `nearest`."""
        known = zip(self._scores, rows.tolist(), strict=True)
        return np.array([[scores.get(row, -np.inf) for row in line] for scores, line in known], np.float32)

    def names(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
        """See `Source`."""
        found = [self._names[row] for row in rows.tolist()]
        return np.array([entry for entry, _ in found], np.str_), np.array([subject for _, subject in found], np.str_)

    def _answers(self, probes: NDArray[np.float32], count: int) -> Iterator[Any]:
        """The hits of each probe; as many probes at a time as an answer has room for."""
        step = max(1, _ANSWER_BYTES // (4 * self._dimension * max(1, count)))
        for start in range(0, len(probes), step):
            yield from self._client.search(
                self._collection,
                data=list(probes[start : start + step]),
                limit=count,
                filter=self._where,
                output_fields=["entry_id", "subject_id", "number", "embedding"],
                search_params=self._effort.search_params(count),
                consistency_level=self._consistency,
            )


def among(field: str, values: Sequence[str]) -> Iterator[str]:
    """Filter expressions that together match the given values of a field.

    Ids of entries many at a time, for each question takes long (Strong); subjects fewer, with any number of entries.
    """
    step = _ASKED_IDS if field == "entry_id" else _QUERY_ROWS
    for start in range(0, len(values), step):
        yield f"{field} in {json.dumps(list(values[start : start + step]), ensure_ascii=False)}"


def stored_entries(client: Any, collection: str, consistency: str) -> Iterator[list[dict[str, Any]]]:
    """All entries with their vectors, some hundred at a time."""
    iterator = client.query_iterator(
        collection, batch_size=_QUERY_ROWS, output_fields=list(FIELDS), consistency_level=consistency
    )
    try:
        while batch := iterator.next():
            yield batch
    finally:
        iterator.close()


def pooled_source(batches: Iterable[list[dict[str, Any]]], dimension: int) -> PooledSource:
    """One template per subject, from all entries of a collection."""
    rows = [row for batch in batches for row in batch]
    rows.sort(key=lambda row: int(row["number"]))
    entries = Entries(
        np.array([row["entry_id"] for row in rows], np.str_),
        np.array([row["subject_id"] for row in rows], np.str_),
        np.array([row["norm"] for row in rows], np.float32),
        np.array([row["number"] for row in rows], np.int64),
    )
    vectors = np.array([row["embedding"] for row in rows], np.float32).reshape(-1, dimension)
    return PooledSource(Rows([vectors] if len(vectors) else [], dimension), entries)
