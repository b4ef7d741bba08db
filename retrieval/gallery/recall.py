"""How much of an exact search an approximate one finds: a sample of searches, and the cheapest effort that is enough.

Legend: P searches of the sample, D embedding dimension, K best scores of each.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery.records import Candidate, IndexKind, Recall
from retrieval.gallery.search import Request, Source, search_source
from retrieval.gallery.segments import SEGMENT_ROWS, Entries, Rows
from retrieval.gallery.sources import FlatSource
from retrieval.gallery.vectors import as_unit, check_embeddings

__all__ = ["RECALL_TOP", "IndexWish", "Sample", "cheapest", "recall_of", "sample_of"]

#: Length of the lists that are compared.
RECALL_TOP = 10
_SAMPLE_COSINE = 0.4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexWish:
    """How an index should be made."""

    kind: IndexKind = "flat"
    recall: float = 0.98  #: recall@1 to reach; the cheapest search that does is kept, or the best there is
    sample: int = 4000  #: searches to measure it with
    probes: NDArray[np.floating[Any]] | None = None  #: (P, D) to measure with; None draws them near enrolled entries


class Sample:
    """Searches whose exact answer is known, from vectors that pass by once.

    Args:
        probes: (P, D) unit vectors.
        source: where they came from.
    """

    def __init__(self, probes: NDArray[np.float32], source: str) -> None:
        self.probes = probes
        self.source = source
        self.best = np.zeros((len(probes), 0), np.float32)  #: (P, K) highest scores so far, best first

    def see(self, vectors: Source) -> None:
        """Compare with more vectors, of a source that searches exactly."""
        found = search_source(vectors, self.probes, Request(top=min(RECALL_TOP, vectors.count)))
        scores = np.array([[candidate.score for candidate in near] for near in found], np.float32)
        both = np.concatenate([self.best, scores], axis=1)
        self.best = -np.sort(-both, axis=1)[:, :RECALL_TOP]

    def see_rows(self, embeddings: NDArray[np.floating[Any]]) -> None:
        """Compare with (n, D) vectors of any length, which are not kept."""
        for start in range(0, len(embeddings), SEGMENT_ROWS):
            unit = as_unit(embeddings[start : start + SEGMENT_ROWS])
            nobody, numbers = np.zeros(len(unit), "U1"), np.arange(len(unit))
            entries = Entries(nobody, nobody, np.ones(len(unit), np.float32), numbers)
            self.see(FlatSource(Rows([unit], unit.shape[1]), entries))


def sample_of(
    wish: IndexWish,
    count: int,
    dimension: int,
    take: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    among: str = "",
) -> Sample:
    """The given probes, or some drawn at a cosine of 0.4 to enrolled vectors.

    Args:
        wish: with the probes, or without.
        count: vectors to draw from.
        dimension: D.
        take: the (n, D) unit vectors of (n,) of them, ascending.
        among: which vectors these are, if not all.
    """
    generator = np.random.default_rng(1)
    if wish.probes is not None:
        check_embeddings(wish.probes, dimension)
        chosen = np.sort(generator.permutation(len(wish.probes))[: wish.sample])
        return Sample(as_unit(wish.probes[chosen].astype(np.float64)), "given")
    chosen = np.sort(generator.permutation(count)[: wish.sample])
    vectors = take(chosen).astype(np.float64)
    noise = generator.standard_normal(vectors.shape)
    noise -= (noise * vectors).sum(axis=1, keepdims=True) * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    probes = _SAMPLE_COSINE * vectors + math.sqrt(1 - _SAMPLE_COSINE**2) * noise
    return Sample(probes.astype(np.float32), f"enrolled entries {among}turned to cosine {_SAMPLE_COSINE}")


def recall_of(found: Sequence[Sequence[Candidate]], sample: Sample) -> Recall:
    """What lists of `RECALL_TOP` candidates hold of the exact ones; who scores as high counts as found."""
    shares = [
        (bool(near) and near[0].score >= true[0], sum(c.score >= true[-1] for c in near) / len(true))
        for near, true in zip(found, sample.best.tolist(), strict=True)
    ]
    at_1, at_10 = (float(value) for value in np.mean(shares, axis=0))
    return Recall(at_1=at_1, at_10=at_10, probes=len(sample.probes), source=sample.source)


def cheapest(
    wish: IndexWish, efforts: Iterable[tuple[int, int]], measure: Callable[[int, int], Recall]
) -> tuple[int, int, Recall]:
    """The first effort that reaches the wanted recall, or the best one with a warning, and the recall there.

    Args:
        wish: kind and wanted recall.
        efforts: (lists visited or candidates kept, candidates compared again for each wanted one), cheapest first.
        measure: the recall of one of them.
    """
    best: tuple[int, int, Recall] | None = None
    for effort, rescored in efforts:
        recall = measure(effort, rescored)
        if best is None or recall.at_1 > best[2].at_1:
            best = effort, rescored, recall
        if recall.at_1 >= wish.recall:
            break
    if best is None:
        raise ValueError(f"no way to search the kind {wish.kind}")
    if best[2].at_1 < wish.recall:
        logger.warning(
            "Index %s: recall@1 is %.4f at most, not %g; choose another kind, or flat.",
            *(wish.kind, best[2].at_1, wish.recall),
        )
    return best
