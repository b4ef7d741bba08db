"""Exact search of many probes by products in bfloat16, on processors that multiply it several times faster.

Scores in bfloat16 are off by a bound that is known (`TOLERANCE`), so they need not be right to find the right entries:
the list is made longer, the caller compares its entries again in float64, and lengthens it further where an entry left
out could still belong to it.

Legend: P probes, N rows, D embedding dimension, K candidates, B rows of a block.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aroface.bf16 import has_bf16_units
from retrieval.gallery.search import Found
from retrieval.gallery.segments import Rows

if TYPE_CHECKING:
    import torch

__all__ = ["TOLERANCE", "nearest_rows_bfloat16", "pays"]

#: Bound on the error of a score of two unit vectors. Rounding both to 8 bits changes their product, whose sum of
#: magnitudes is at most 1, by less than 2^-7 + 2^-16; rounding that, by 2^-8; adding up in float32 costs below 2^-12.
TOLERANCE = 2.0**-7 + 2.0**-8 + 2.0**-11
_MORE = 32  #: candidates: so that few lists have to be lengthened
_BLOCK_ROWS = 1 << 11  #: scores of 1,024 probes stay in the cache
_LEAST_PRODUCTS = 1 << 27  #: about a second of work in float32: below, importing PyTorch costs more than is won
_LEAST_PROBES = 64  #: every row is rounded once for all of them


def pays(probes: int, rows: int) -> bool:
    """Whether a search of this size is faster here than in float32."""
    is_large = probes >= _LEAST_PROBES and probes * rows >= _LEAST_PRODUCTS
    return is_large and has_bf16_units()


def nearest_rows_bfloat16(rows: Rows, probes: NDArray[np.float32], count: int) -> Found:
    """At least the `count` nearest rows of each (P, D) probe by inner product in bfloat16."""
    import torch

    best = _Best(len(probes), min(len(rows), count + _MORE))
    half = torch.from_numpy(np.ascontiguousarray(probes)).bfloat16()
    scores = torch.empty((len(probes), _BLOCK_ROWS), dtype=torch.bfloat16)
    start = 0
    with torch.inference_mode():
        for block in rows.blocks(_BLOCK_ROWS):
            out = scores if len(block) == _BLOCK_ROWS else scores.new_empty((len(probes), len(block)))
            torch.mm(half, torch.tensor(block).bfloat16().T, out=out)
            if start:
                places = np.flatnonzero(_above(out, best.worst))
                values = out.flatten()[torch.from_numpy(places)].float().numpy()
                best.add(places // len(block), start + places % len(block), values)
            else:
                best.begin(out.float().numpy())
            start += len(block)
    best.merge()
    left_out = best.worst if best.scores.shape[1] < len(rows) else np.full(len(probes), -np.inf, np.float32)
    return Found(best.rows, left_out, TOLERANCE)


def _above(scores: "torch.Tensor", worst: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(P, B) where a bfloat16 score is above that of its probe.

    NumPy has no such type, but above zero its bits are whole numbers in the same order.
    """
    import torch

    if (worst > 0).all():
        bits = torch.from_numpy(worst).bfloat16().view(torch.int16).numpy()  # exact: it was one of the scores
        above: NDArray[np.bool_] = scores.view(torch.int16).numpy() > bits[:, None]
    else:
        above = scores.float().numpy() > worst[:, None]
    return above


class _Best:
    """The K best rows of each probe so far, and what has come since they were last sorted."""

    def __init__(self, probes: int, count: int) -> None:
        self.scores = np.full((probes, count), -np.inf, np.float32)
        self.rows = np.full((probes, count), -1, np.int64)
        self.worst = np.full(probes, -np.inf, np.float32)  #: (P,) K-th best score
        self._new: list[tuple[NDArray[Any], ...]] = []
        self._waiting = 0

    def begin(self, scores: NDArray[np.float32]) -> None:
        """(P, B) scores of the first B rows."""
        count = min(self.scores.shape[1], scores.shape[1])
        nearest = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        self.rows[:, :count] = nearest
        self.scores[:, :count] = np.take_along_axis(scores, nearest, axis=1)
        self.worst = self.scores.min(axis=1)

    def add(self, probes: NDArray[np.int64], rows: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """(n,) entries, the probes ascending."""
        self._new.append((probes, rows, scores))
        self._waiting += len(probes)
        if self._waiting > self.scores.size:
            self.merge()

    def merge(self) -> None:
        """Take what has come into the lists."""
        if not self._waiting:
            return
        probes, rows, scores = (np.concatenate(column) for column in zip(*self._new, strict=True))
        self._new, self._waiting = [], 0
        order = np.lexsort((-scores, probes))
        probes, rows, scores = probes[order], rows[order], scores[order]
        count = self.scores.shape[1]
        place = np.arange(len(probes)) - np.searchsorted(probes, probes)  # 0, 1, ... within each probe
        kept = place < count
        width = int(place[kept].max()) + 1
        more_scores = np.full((len(self.scores), width), -np.inf, np.float32)
        more_rows = np.full((len(self.scores), width), -1, np.int64)
        more_scores[probes[kept], place[kept]] = scores[kept]
        more_rows[probes[kept], place[kept]] = rows[kept]
        all_scores = np.concatenate([self.scores, more_scores], axis=1)
        nearest = np.argpartition(-all_scores, count - 1, axis=1)[:, :count]
        self.scores = np.take_along_axis(all_scores, nearest, axis=1)
        self.rows = np.take_along_axis(np.concatenate([self.rows, more_rows], axis=1), nearest, axis=1)
        self.worst = self.scores.min(axis=1)
