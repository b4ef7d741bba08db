"""Candidate lists: the best gallery entries of every probe, as a table that other programs read."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.files import atomic_path
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.score_blocks import BlockMaker, Sides, Similarity, exact_blocks

__all__ = ["HEADER", "candidate_rows", "write_candidates"]

HEADER = ("probe", "rank", "gallery", "score", "subject", "set")


def candidate_rows(
    gallery: EmbeddingSet,
    probes: EmbeddingSet,
    *,
    count: int,
    similarity: Similarity = "cosine",
    blocks: BlockMaker | None = None,
) -> Iterator[tuple[str, int, str, float, str]]:
    """(probe, rank, gallery entry, score, subject of the entry) of the `count` best entries of every probe.

    Of equal scores the entry that comes first in the gallery is listed first: a list shows an order, and the metrics
    decide ties by their own rule. A probe that failed to enrol has no candidates, and an entry that failed is none.
    """
    names, entries = _names(probes), _names(gallery)
    subjects = gallery.subject_ids.tolist()
    for part, block in exact_blocks(Sides(gallery, probes, np.arange(len(gallery)), similarity), blocks):
        own = np.arange(part.stop - part.start)
        for rows, columns, scores in block.at_least(own, block.floors(own, count)):
            order = np.lexsort((columns, -scores, rows))
            ranks = 1 + np.arange(len(rows)) - np.searchsorted(rows, rows)  # rows ascend before and after the sort
            order, ranks, rows = order[ranks <= count], ranks[ranks <= count], rows[ranks <= count]
            found = zip(rows.tolist(), ranks.tolist(), columns[order].tolist(), scores[order].tolist(), strict=True)
            for row, rank, column, score in found:
                yield names[part.start + row], rank, entries[column], score, str(subjects[column])


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
    blocks: BlockMaker | None = None,
) -> None:
    """Write the lists of one or two galleries as CSV, atomically; `set` is 1 or 2.

    Names that are no Unicode keep their bytes.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADER)
        for number, gallery in enumerate(galleries, start=1):
            for row in candidate_rows(gallery, probes, count=count, similarity=similarity, blocks=blocks):
                table.writerow((*row, number))
