"""Candidate lists: the best gallery entries of every probe, as a table that other programs read."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.files import atomic_path
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.search import Similarity, score_tiles

__all__ = ["HEADER", "candidate_rows", "write_candidates"]

HEADER = ("probe", "rank", "gallery", "score", "subject", "set")


def candidate_rows(
    gallery: EmbeddingSet, probes: EmbeddingSet, *, count: int, similarity: Similarity = "cosine"
) -> Iterator[tuple[str, int, str, float, str]]:
    """(probe, rank, gallery entry, score, subject of the entry) of the `count` best entries of every probe.

    Of equal scores the entry that comes first in the gallery is listed first: a list shows an order, and the metrics
    decide ties by their own rule. A probe that failed to enrol has no candidates, and an entry that failed is none.
    """
    names, entries = _names(probes), _names(gallery)
    subjects = gallery.subject_ids.tolist()
    for part, scores in score_tiles(gallery, probes, np.arange(len(gallery)), similarity=similarity):
        for name, row in zip(names[part], scores, strict=True):
            for rank, column in enumerate(_best(row, count), start=1):
                if np.isfinite(row[column]):
                    yield name, rank, entries[column], float(row[column]), str(subjects[column])


def _best(row: NDArray[np.float32], count: int) -> list[int]:
    """Columns of the largest scores, descending; of equals the first columns."""
    count = min(count, len(row))
    floor = np.partition(row, len(row) - count)[len(row) - count]
    columns = np.flatnonzero(row >= floor)
    order: list[int] = columns[np.argsort(-row[columns], kind="stable")][:count].tolist()
    return order


def _names(embeddings: EmbeddingSet) -> list[str]:
    """Template id, else key, else row number."""
    found: NDArray[Any] | None = embeddings.template_ids if embeddings.template_ids is not None else embeddings.keys
    return [str(name) for name in (range(len(embeddings)) if found is None else found.tolist())]


def write_candidates(
    path: Path,
    galleries: Sequence[EmbeddingSet],
    probes: EmbeddingSet,
    *,
    count: int,
    similarity: Similarity = "cosine",
) -> None:
    """Write the lists of one or two galleries as CSV, atomically; `set` is 1 or 2."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADER)
        for number, gallery in enumerate(galleries, start=1):
            for row in candidate_rows(gallery, probes, count=count, similarity=similarity):
                table.writerow((*row, number))
