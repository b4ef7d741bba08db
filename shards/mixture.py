"""Several data sets as one stream, in fixed ratios."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.types import TrainingData
from shards.loader import Readable
from shards.permutation import permute

if TYPE_CHECKING:
    from aroface.types import Batch

__all__ = ["Mixture"]

_SLOTS = 1000


class MixablePart(TrainingData, Readable, Protocol):
    """A data set that can be part of a mixture."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def num_stored(self) -> int:
        """Samples that `describe` knows, chosen or not."""
        ...


class Mixture:
    """Data sets side by side as `aroface.types.TrainingData`: their classes follow one another, nothing is joined.

    Blocks of 1000 positions hold a whole number of places of each set, the ratios to the nearest thousandth; within a
    block the places are permuted. Every set is walked through in its own order, so that each of its samples comes once
    per epoch *of that set*. An epoch of the mixture is as many positions as all sets have samples together. What stands
    at a position is a pure function of (seed, position), as for one set.

    Args:
        parts: data sets of equal image size.
        ratios: shares of the stream, of any sum.

    Raises:
        DataError: a ratio so small that it would round to nothing.
    """

    def __init__(self, parts: Sequence[MixablePart], ratios: Sequence[float]) -> None:
        self._parts = parts
        self._slots = _slots(ratios, [part.name for part in parts])
        self._slot_starts = np.cumsum([0, *self._slots])
        self._sample_starts = np.cumsum([0, *(part.num_stored for part in parts)])
        self._class_starts = np.cumsum([0, *(part.num_classes for part in parts)])
        self.num_samples = sum(part.num_samples for part in parts)
        self.num_classes = int(self._class_starts[-1])
        self.image_size = parts[0].image_size
        self.workers = parts[0].workers
        text = " ".join(f"{part.fingerprint}:{slots}" for part, slots in zip(parts, self._slots, strict=True))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """(K,) samples, counted through all sets, at stream positions."""
        part, places = self._places(positions, seed)
        result = np.empty_like(positions)
        for number, data in enumerate(self._parts):
            chosen = part == number
            if chosen.any():
                result[chosen] = self._sample_starts[number] + data.samples_at(places[chosen], seed=seed)
        return result

    def _places(self, positions: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Set and position in the stream of that set."""
        blocks, slots = np.divmod(positions, _SLOTS)
        part, turn = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            parts, turns = self._layout(block, seed)
            part[chosen], turn[chosen] = parts[slots[chosen]], turns[slots[chosen]]
        return part, blocks * np.asarray(self._slots)[part] + turn

    def _layout(self, block: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Set of each place of a block, and how many places of that set come before it in the block."""
        permuted = permute(np.arange(_SLOTS), size=_SLOTS, seed=seed, epoch=block, purpose="mixture")
        parts = np.searchsorted(self._slot_starts, permuted, side="right") - 1
        turns = np.empty_like(parts)
        for number, slots in enumerate(self._slots):
            turns[parts == number] = np.arange(slots)
        return parts, turns

    def fill(self, samples: NDArray[np.int64], images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Decode samples into the rows of a batch."""
        part = np.searchsorted(self._sample_starts, samples, side="right") - 1
        for row, number in enumerate(part.tolist()):
            one = slice(row, row + 1)
            self._parts[number].fill(samples[one] - self._sample_starts[number], images[one], labels[one])
            labels[row] += self._class_starts[number]

    def read_ahead(self, position: int, *, seed: int) -> None:
        """Pass the hint on, with the position of each set."""
        block = position // _SLOTS
        for slots, data in zip(self._slots, self._parts, strict=True):
            data.read_ahead((block + 1) * slots - 1, seed=seed)

    def batches(
        self, *, seed: int, start_position: int, num_batches: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator["Batch"]:
        """See `aroface.types.TrainingData.batches`."""
        from shards.loader import iterate_batches

        return iterate_batches(
            self,
            seed=seed,
            start_position=start_position,
            num_batches=num_batches,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )

    def describe(self, sample: int) -> str:
        """`set: shard-000003.tar: identity/name.jpg` of one sample."""
        number = int(np.searchsorted(self._sample_starts, sample, side="right")) - 1
        data = self._parts[number]
        return f"{data.name}: {data.describe(sample - int(self._sample_starts[number]))}"


def _slots(ratios: Sequence[float], names: Sequence[str]) -> list[int]:
    """Places of each set in a block: the largest remainders are rounded up."""
    exact = np.asarray(ratios, np.float64) / sum(ratios) * _SLOTS
    slots = np.floor(exact).astype(int)
    for number in np.argsort(slots - exact, kind="stable")[: _SLOTS - int(slots.sum())]:
        slots[number] += 1
    if not slots.all():
        name = names[int(np.argmin(slots))]
        raise DataError(
            f"data.shards: the ratio of {name} is below 1/{_SLOTS} of the whole; raise it, or leave it out."
        )
    return [int(count) for count in slots]
