"""Scores of probes against a gallery on one GPU or several, the same as on the CPU.

The gallery is dealt out to the devices in stretches of columns, in float64; every block of probes goes to all of them,
and counts come back, with the few pairs that are too near to a level to be counted. Lists of nearest entries would not
do here: the rank of a mate may be the last one, and ties may be as many as there are entries. And float64 rather than
float32: next to nothing is so near to a level that it is computed again (`score_blocks.py`), where float32 would leave
one pair of a thousand.
A100, H100 and H200 multiply float64, in tensor cores, as fast as they do float32.

Legend: P probes, G gallery entries, D embedding dimension, R probes of a block, n pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ConfigError
from retrieval.devices import gpu_numbers
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics.score_blocks import BlockMaker, Pairs, Sides, groups_of_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["blocks_on", "search_devices"]

#: Scores of a block on one device: 1 GiB, which is there twice or three times for a moment.
_BLOCK_ELEMENTS = 1 << 27
_MOST_ROWS = 1 << 15
#: Rows of the gallery that are made ready on the host at a time.
_UPLOAD_ROWS = 1 << 15


def search_devices(device: str) -> "list[torch.device]":
    """The GPUs of `cpu` (none), `cuda` (all), `cuda:0` or `cuda:0,2`.

    Raises:
        ConfigError: not such a name, or a GPU that PyTorch does not see.
    """
    numbers = gpu_numbers(device)
    if not numbers:
        return []
    import torch

    return [torch.device("cuda", number) for number in numbers]


def blocks_on(devices: "Sequence[torch.device]") -> BlockMaker:
    """Blocks of scores that lie on these devices.

    Raises (when used):
        ConfigError: the gallery does not fit on them, or scores that are not cosines.
    """
    return partial(_device_blocks, tuple(devices))


def _device_blocks(devices: "Sequence[torch.device]", sides: Sides) -> "Iterator[tuple[slice, _DeviceBlock]]":
    import torch

    if sides.similarity != "cosine":
        raise ConfigError(
            f"similarity {sides.similarity} is computed on the CPU only; choose --device cpu, or --similarity cosine."
        )
    edges = np.linspace(0, len(sides.order), min(len(devices), len(sides.order)) + 1).astype(np.int64)
    size = max(1, min(_MOST_ROWS, _BLOCK_ELEMENTS // int(np.diff(edges).max())))
    try:
        shards = [
            _Shard.of(sides, device, start, stop)
            for device, start, stop in zip(devices, edges[:-1].tolist(), edges[1:].tolist(), strict=False)
        ]
        for first in range(0, len(sides.probes), size):
            part = slice(first, min(first + size, len(sides.probes)))
            yield part, _DeviceBlock([shard.scores(sides, np.arange(part.start, part.stop)) for shard in shards], edges)
    except torch.OutOfMemoryError as error:
        needed = 8 * sides.gallery.embeddings.shape[1] * int(np.diff(edges).max())
        raise ConfigError(
            f"{sides.gallery.name} takes {needed / 2**30:.1f} GiB on each of {len(edges) - 1} GPU(s), and blocks of "
            "scores some 4 GiB more, which is not free there. Name more of them with --device cuda:0,1, end what else "
            "runs there, or choose cpu."
        ) from error


@dataclass(frozen=True)
class _Shard:
    """The columns of one device."""

    unit: "Tensor"  #: (g, D) float64
    failed: "Tensor"  #: columns that failed to enrol and score -inf

    @classmethod
    def of(cls, sides: Sides, device: "torch.device", start: int, stop: int) -> "_Shard":
        import torch

        unit = torch.empty((stop - start, sides.gallery.embeddings.shape[1]), dtype=torch.float64, device=device)
        for first in range(start, stop, _UPLOAD_ROWS):
            rows = sides.order[first : min(first + _UPLOAD_ROWS, stop)]
            unit[first - start : first - start + len(rows)] = _unit(sides.gallery, rows, device)
        failed = np.flatnonzero(~sides.gallery.enrolled[sides.order[start:stop]] & sides.failed_miss)
        return cls(unit, _on(device, failed))

    def scores(self, sides: Sides, rows: NDArray[np.int64]) -> "Tensor":
        """(R, g) scores of the probes of these rows."""
        device = self.unit.device
        scores = _unit(sides.probes, rows, device) @ self.unit.T
        scores[:, self.failed] = -np.inf
        scores[_on(device, np.flatnonzero(~sides.probes.enrolled[rows] & sides.failed_miss))] = -np.inf
        return scores


def _unit(side: EmbeddingSet, rows: NDArray[np.int64], device: "torch.device") -> "Tensor":
    """(n, D) float64 rows of length 1, zero where not enrolled; the host would take longer for them than the GPU."""
    values = side.embeddings[rows]
    values[~side.enrolled[rows]] = 0
    wide = _on(device, values).double()
    lengths = wide.norm(dim=1, keepdim=True)
    unit: Tensor = wide / lengths.where(lengths > 0, 1.0)
    return unit


@dataclass(frozen=True)
class _DeviceBlock:
    """A block that lies on devices."""

    scores: "list[Tensor]"  #: (R, g) of each device
    edges: NDArray[np.int64]  #: first column of each device, and G

    def at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        found = np.empty(len(rows), np.float64)
        shard = np.searchsorted(self.edges, columns, side="right") - 1
        for index, scores in enumerate(self.scores):
            own = shard == index
            places = _on(scores.device, rows[own]), _on(scores.device, columns[own] - self.edges[index])
            found[own] = scores[places].cpu().numpy()
        return found

    def highest(self, rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        import torch

        best = []
        for own in self._of(rows):
            best.append(own.topk(min(count, own.shape[1]), dim=1, sorted=False).values.cpu())
        values = torch.cat(best, dim=1)
        return values.topk(min(count, values.shape[1]), dim=1).values[:, -1].numpy()

    def count(self, rows: NDArray[np.int64], lows: NDArray[np.float64]) -> NDArray[np.int64]:
        return _counts([scores >= _on(scores.device, lows)[:, None] for scores in self._of(rows)])

    def within(self, rows: NDArray[np.int64], lows: NDArray[np.float64], highs: NDArray[np.float64]) -> Iterator[Pairs]:
        own = self._of(rows)
        masks = [
            (scores >= _on(scores.device, lows)[:, None]) & (scores < _on(scores.device, highs)[:, None])
            for scores in own
        ]
        for part in groups_of_rows(_counts(masks)):
            found = [_pairs(scores[part], mask[part]) for scores, mask in zip(own, masks, strict=True)]
            columns = np.concatenate([pair[1] + edge for pair, edge in zip(found, self.edges, strict=False)])
            places, scores = (np.concatenate([pair[field] for pair in found]) for field in (0, 2))
            order = np.argsort(places, kind="stable")  # each device gave ascending columns
            yield rows[part.start + places[order]], columns[order], scores[order]

    def _of(self, rows: NDArray[np.int64]) -> "list[Tensor]":
        """(n, g) scores of ascending rows on each device."""
        if len(rows) == len(self.scores[0]):
            return self.scores
        return [scores[_on(scores.device, rows)] for scores in self.scores]


def _counts(masks: "Sequence[Tensor]") -> NDArray[np.int64]:
    """(n,) true columns over all devices."""
    counts: NDArray[np.int64] = np.stack([mask.sum(dim=1).cpu().numpy() for mask in masks]).sum(axis=0)
    return counts


def _pairs(scores: "Tensor", chosen: "Tensor") -> Pairs:
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows.cpu().numpy(), columns.cpu().numpy(), scores[rows, columns].cpu().numpy()


def _on(device: "torch.device", values: NDArray[Any]) -> "Tensor":
    import torch

    return torch.from_numpy(values).to(device)
