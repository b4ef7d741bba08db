"""1:1 from a search: every probe compared with every gallery entry, for sets that list no pairs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.score_blocks import Sides, Similarity, numpy_blocks

__all__ = ["MOST_COMPARISONS", "Comparisons", "compare_all"]

#: Scores that are kept at once, 1 GiB with their labels.
MOST_COMPARISONS = 1 << 27


@dataclass(frozen=True)
class Comparisons:
    """All pairs of a probe and an entry, probe by probe. All arrays are (P * G,)."""

    scores: NDArray[np.float32]
    same: NDArray[np.bool_]
    probe: NDArray[np.int32]  #: row
    entry: NDArray[np.int32]  #: row


def compare_all(gallery: EmbeddingSet, probes: EmbeddingSet, *, similarity: Similarity = "cosine") -> Comparisons:
    """Compare all probes with all entries.

    Raises:
        DataError: more than `MOST_COMPARISONS`.
    """
    rows, columns = len(probes), len(gallery)
    if rows * columns > MOST_COMPARISONS:
        raise DataError(f"{rows} probes and {columns} entries are {rows * columns} comparisons; list pairs instead.")
    scores = np.empty((rows, columns), np.float32)
    for part, block in numpy_blocks(Sides(gallery, probes, np.arange(columns), similarity)):
        scores[part] = block.scores
    same = probes.subject_ids[:, None] == gallery.subject_ids[None, :]
    probe = np.repeat(np.arange(rows, dtype=np.int32), columns)
    return Comparisons(scores.reshape(-1), same.reshape(-1), probe, np.tile(np.arange(columns, dtype=np.int32), rows))
