"""Candidate lists in a defined order, whatever the index returns.

Faiss computes scores in a float32 matrix product, whose last bits depend on the batch size and on the position of an
entry: the same two faces may score 0.70000005 and 0.69999999, and entries that tie may come in any order or be cut
off. So its answer is taken as a list of candidates. Their scores are computed again, one row at a time in float64 and
rounded to float32, and the list is lengthened until no entry that was left out could belong to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidate", "Level", "as_candidates", "search_index"]

#: `entry`: every enrolled entry is a candidate. `subject`: one per subject, with its best entry.
Level = Literal["entry", "subject"]

_BATCH_PROBES = 256
_EXTRA_CANDIDATES = 16


@dataclass(frozen=True)
class Candidate:
    """One line of a candidate list."""

    entry_id: str
    subject_id: str
    score: float  #: cosine similarity
    rank: int  #: 1 is the best; equal scores are ordered by enrolment, the earlier first


def search_index(
    index: Any,
    embeddings: NDArray[np.float32],
    probes: NDArray[np.float32],
    top: int,
    subject_rows: NDArray[np.int64] | None,
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows and scores of the `top` best entries of each probe, best first, equal scores by row.

    Args:
        index: Faiss index over `embeddings`, inner product.
        embeddings: (N, D) unit vectors.
        probes: (P, D) unit vectors.
        top: length of the lists, at least 1; shorter where there are fewer entries.
        subject_rows: (N,) number of the subject of each entry, to keep only the best entry of each; None keeps all.
    """
    found: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    for start in range(0, len(probes), _BATCH_PROBES):
        found.extend(_search_batch(index, embeddings, probes[start : start + _BATCH_PROBES], top, subject_rows))
    return found


def _search_batch(
    index: Any,
    embeddings: NDArray[np.float32],
    probes: NDArray[np.float32],
    top: int,
    subject_rows: NDArray[np.int64] | None,
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    num_entries, dimension = embeddings.shape
    tolerance = 2.0 * (dimension + 2) * float(np.finfo(np.float32).eps)  # bound of the product of two unit vectors
    wanted = min(num_entries, top + _EXTRA_CANDIDATES)
    results: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
    open_probes = np.arange(len(probes))
    while len(open_probes):
        scores, rows = index.search(probes[open_probes], wanted)
        for probe, near_scores, near_rows in zip(open_probes, scores, rows, strict=True):
            chosen = _ordered(embeddings, probes[probe], np.sort(near_rows), subject_rows)
            complete = wanted == num_entries
            if not complete and len(chosen[0]) >= top:
                complete = float(chosen[1][top - 1]) > float(near_scores[-1]) + tolerance
            if complete:
                results[int(probe)] = (chosen[0][:top], chosen[1][:top])
        open_probes = np.array([probe for probe in open_probes if int(probe) not in results], np.int64)
        wanted = min(num_entries, 4 * wanted)
    return [results[probe] for probe in range(len(probes))]


def _ordered(
    embeddings: NDArray[np.float32],
    probe: NDArray[np.float32],
    rows: NDArray[np.int64],
    subject_rows: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`rows` (ascending) by score, equal scores by row."""
    products = embeddings[rows].astype(np.float64) * probe
    scores = products.sum(axis=1).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    if subject_rows is not None:
        _, first = np.unique(subject_rows[rows[order]], return_index=True)
        order = order[np.sort(first)]
    return rows[order], scores[order]


def as_candidates(
    rows: NDArray[np.int64], scores: NDArray[np.float32], name: Callable[[int], tuple[str, str]]
) -> list[Candidate]:
    """A candidate list; `name` gives entry id and subject id of a row."""
    return [
        Candidate(*name(int(row)), score=float(score), rank=rank)
        for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1)
    ]
