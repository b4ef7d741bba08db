"""A collection of Milvus as something that can be searched: its answers, with the vectors to compare them again."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery.search import Found, exact_products, rounding_bound
from retrieval.gallery.segments import Entries, Rows
from retrieval.gallery.sources import PooledSource

__all__ = ["FIELDS", "MAX_LIST", "MilvusSource", "among", "pooled_source", "stored_entries"]

#: Longest list that Milvus gives.
MAX_LIST = 16384
FIELDS = ("entry_id", "subject_id", "norm", "number", "embedding")
_EXTRA_CANDIDATES = 16
_QUERY_ROWS = 1000


class MilvusSource:
    """Entries of a collection; a row is the number that an entry was given when it was enrolled.

    Args:
        client: `pymilvus.MilvusClient`.
        collection: its name.
        dimension: D.
        count: entries in it.
        is_exact: it compares with every entry.
        where: Milvus filter expression; "" for all entries.
        consistency: Milvus consistency level.
    """

    max_list = MAX_LIST

    def __init__(
        self, client: Any, collection: str, dimension: int, count: int, *, is_exact: bool, where: str, consistency: str
    ) -> None:
        self.count = count
        self.tolerance: float | None = rounding_bound(dimension) if is_exact else None
        self._client = client
        self._collection = collection
        self._dimension = dimension
        self._where = where
        self._consistency = consistency
        self._seen: dict[int, tuple[str, str, NDArray[np.float32]]] = {}

    def first_list(self, top: int) -> int:
        """See `Source`."""
        return top + _EXTRA_CANDIDATES

    def nearest(self, probes: NDArray[np.float32], count: int) -> Found:
        """See `Source`."""
        answers = self._client.search(
            self._collection,
            data=list(probes),
            limit=count,
            filter=self._where,
            output_fields=["entry_id", "subject_id", "number", "embedding"],
            consistency_level=self._consistency,
        )
        rows = np.full((len(probes), count), -1, np.int64)
        left_out = np.full(len(probes), -np.inf, np.float32)
        for place, hits in enumerate(answers):
            for column, hit in enumerate(hits):
                entity = hit["entity"]
                number = int(entity["number"])
                vector = np.asarray(entity["embedding"], np.float32)
                self._seen[number] = (str(entity["entry_id"]), str(entity["subject_id"]), vector)
                rows[place, column] = number
            if len(hits) == count and count < self.count:
                left_out[place] = hits[-1]["distance"]
        return Found(rows, left_out)

    def approximate_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Source`."""
        return self.exact_scores(probes, rows)  # few, and at hand

    def exact_scores(self, probes: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Source`."""
        vectors = np.zeros((rows.size, self._dimension), np.float32)
        for place, row in enumerate(rows.ravel().tolist()):
            if row >= 0:
                vectors[place] = self._seen[row][2]
        scores = exact_products(vectors, np.repeat(probes, rows.shape[1], axis=0)).reshape(rows.shape)
        scores[rows < 0] = -np.inf
        return scores

    def names(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
        """See `Source`."""
        seen = [self._seen[row] for row in rows.tolist()]
        return np.array([s[0] for s in seen], np.str_), np.array([s[1] for s in seen], np.str_)


def among(field: str, values: Sequence[str]) -> Iterator[str]:
    """Filter expressions that together match the given values of a field, some hundred at a time."""
    for start in range(0, len(values), _QUERY_ROWS):
        yield f"{field} in {json.dumps(list(values[start : start + _QUERY_ROWS]), ensure_ascii=False)}"


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
