"""Exact search on GPUs by products of PyTorch: the vectors are dealt out to them, every probe goes to all.

Faiss' own flat index of a GPU took 34 ms for one probe of 10^7 vectors in float16 on an H200 that reads them in 2.4 ms,
and 27 times what its arithmetic takes for many (docs/results/h200.md). Here a block of scores is one product. Of it,
the highest of every `_GROUP` columns are taken in one pass, and only the groups that can hold one of the best are
looked at again.

Legend: P probes, N rows, D embedding dimension, K places of a list, B columns of a block of scores.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ConfigError
from retrieval.gallery.segments import Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FlatOnGPU"]

#: Scores of a block: 1 GiB in float32; fewer where there is no room for them.
_BLOCK_SCORES, _LEAST_SCORES = 1 << 28, 1 << 20
#: Places in all lists of one block: 384 MiB with their rows, twice for a moment.
_BLOCK_PLACES = 1 << 25
_GROUP = 64
#: Rows that are made ready on the host at a time.
_UPLOAD_ROWS = 1 << 18


class FlatOnGPU:
    """All vectors, on devices of PyTorch; one thread may search at a time, for the memory of its scores.

    Args:
        rows: (N, D) unit vectors, read in blocks.
        devices: each holds as many rows, one device after the other.
        use_float16: keep float16. Products are added up in float32.
    """

    def __init__(self, rows: Rows, devices: "Sequence[torch.device]", *, use_float16: bool) -> None:
        share = max(1, -(-len(rows) // len(devices)))
        firsts = range(0, len(rows), share)  # few rows: fewer devices
        self._shards = [
            _uploaded(rows, first, min(first + share, len(rows)), device, use_float16=use_float16)
            for first, device in zip(firsts, devices, strict=False)
        ]
        self._firsts = list(firsts)
        self._block_scores = _BLOCK_SCORES

    def search(self, probes: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(P, count) scores and rows of the nearest of each (P, D) probe, best first; `count` is at most N.

        Raises:
            ConfigError: no memory is left on a device for the scores.
        """
        import torch

        at_once = max(1, _BLOCK_PLACES // count)
        parts = [probes[start : start + at_once] for start in range(0, len(probes), at_once)]
        while True:
            try:
                with torch.inference_mode(), _whole_float32():
                    scores, rows = zip(*(self._search(part, count) for part in parts), strict=True)
                return np.concatenate(scores), np.concatenate(rows)
            except torch.OutOfMemoryError as error:
                if self._block_scores <= _LEAST_SCORES:
                    raise ConfigError(
                        f"No memory is left beside the gallery for the search of {len(probes)} probes on "
                        f"{len(self._shards)} GPU(s). End what else runs there, name more GPUs, or choose cpu."
                    ) from error
                self._block_scores //= 4

    def _search(self, probes: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        import torch

        given, size = torch.from_numpy(np.ascontiguousarray(probes)), self._block_scores // len(probes)
        # Each device is busy before the first answer is waited for.
        found = [_nearest(given.to(shard.device, shard.dtype), shard, count, size) for shard in self._shards]
        scores = torch.cat([scores.cpu() for scores, _ in found], dim=1)
        rows = torch.cat([near.cpu() + first for (_, near), first in zip(found, self._firsts, strict=True)], dim=1)
        best = scores.topk(count, dim=1)
        return best.values.numpy(), rows.gather(1, best.indices).numpy()


def _uploaded(rows: Rows, first: int, stop: int, device: "torch.device", *, use_float16: bool) -> "Tensor":
    import torch

    dtype = torch.float16 if use_float16 else torch.float32
    vectors = torch.empty((stop - first, rows.dimension), dtype=dtype, device=device)
    for start in range(first, stop, _UPLOAD_ROWS):
        block = rows.take(np.arange(start, min(start + _UPLOAD_ROWS, stop)))
        vectors[start - first : start - first + len(block)] = torch.from_numpy(block).to(device)
    return vectors


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Somebody may have allowed products of float32 in tf32, whose factors have 11 bits."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _nearest(probes: "Tensor", vectors: "Tensor", count: int, size: int) -> "tuple[Tensor, Tensor]":
    """(P, K) scores and rows of the nearest, in any order; K is the least of `count` and N.

    Args:
        probes: (P, D).
        vectors: (N, D).
        count: length of the lists.
        size: about how many vectors at a time.
    """
    import torch

    size = max(_GROUP, size // _GROUP * _GROUP)
    scores, rows = _highest(_products(probes, vectors[:size]), count)
    for start in range(size, len(vectors), size):
        more_scores, more = _highest(_products(probes, vectors[start : start + size]), count)
        both, both_rows = torch.cat([scores, more_scores], dim=1), torch.cat([rows, more + start], dim=1)
        scores, chosen = both.topk(min(count, both.shape[1]), dim=1, sorted=False)
        rows = both_rows.gather(1, chosen)
    return scores, rows


def _products(probes: "Tensor", vectors: "Tensor") -> "Tensor":
    """(P, B) inner products in float32."""
    import torch

    if vectors.dtype == torch.float32:
        return probes @ vectors.T
    if vectors.is_cuda:
        return torch.mm(probes, vectors.T, out_dtype=torch.float32)
    return probes.float() @ vectors.float().T


def _highest(scores: "Tensor", count: int) -> "tuple[Tensor, Tensor]":
    """The `count` highest of each row of (P, B), and their columns.

    An entry that is among them is in one of as many groups with the highest maxima, or ties with what is there.
    """
    import torch

    probes, columns = scores.shape
    groups = columns // _GROUP
    if groups <= 2 * count:
        return scores.topk(min(count, columns), dim=1, sorted=False)
    # Column c is in group c % groups: the maxima of neighbouring groups are taken side by side.
    grouped = scores[:, : groups * _GROUP].view(probes, _GROUP, groups)
    chosen = grouped.amax(1).topk(count, dim=1, sorted=False).indices
    of_groups = chosen[:, None, :] + groups * torch.arange(_GROUP, device=scores.device)[:, None]
    of_rest = torch.arange(groups * _GROUP, columns, device=scores.device).expand(probes, -1)
    candidates = torch.cat([of_groups.flatten(1), of_rest], dim=1)
    best = scores.gather(1, candidates).topk(count, dim=1, sorted=False)
    return best.values, candidates.gather(1, best.indices)
