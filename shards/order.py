"""Which sample stands at each position of the stream: pure functions of (seed, position), without state or storage.

Legend: K positions asked for, N samples of the set, C classes. An epoch is N positions in every order, so that settings
counted in epochs mean the same number of steps.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.config.data import BalancedOrder, BlockOrder, OrderConfig, RandomOrder, WeightedOrder
from aroface.errors import DataError
from shards.permutation import key_of, mix, permute, permute_each

__all__ = ["Balanced", "Blocks", "Order", "Random", "Weighted", "build_order", "read_weights"]


class Order(Protocol):
    """A rule for the order of N samples."""

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """(K,) samples in [0, N) at stream positions >= 0."""
        ...


class Random:
    """Every sample once per epoch, in an order without locality."""

    def __init__(self, num_samples: int) -> None:
        self._size = num_samples

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """See `Order`."""
        epochs, places = np.divmod(positions, self._size)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(places[chosen], size=self._size, seed=seed, epoch=int(epoch))
        return result


class Blocks:
    """Every sample once per epoch; nearby positions lie in a few blocks of stored neighbours.

    Blocks of `block` consecutive samples come in a random order; positions are shuffled within a window of `window`
    blocks. The stored order is rotated by another amount each epoch, so that block borders move and the samples that
    fill no whole block, which end an epoch, are others each time.

    Args:
        num_samples: N.
        block: samples of a block.
        window: blocks that are shuffled together; memory of the page cache that a rank needs is about this many blocks.
    """

    def __init__(self, num_samples: int, *, block: int, window: int) -> None:
        self._size = num_samples
        self._block = min(block, num_samples)
        self._window = window
        self._num_full = num_samples // self._block

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """See `Order`."""
        epochs, places = np.divmod(positions, self._size)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._in_epoch(places[chosen], seed, int(epoch))
        return result

    def _in_epoch(self, places: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        span = self._window * self._block
        whole = self._num_full * self._block
        rotated = np.empty_like(places)
        windows = np.where(places < whole, places // span, -1)
        for window in np.unique(windows):
            chosen = windows == window
            # The samples behind the last whole block are a window of their own.
            start, stop = (window * span, min((window + 1) * span, whole)) if window >= 0 else (whole, self._size)
            inside = permute(
                places[chosen] - start, size=int(stop - start), seed=seed, epoch=epoch, purpose=f"window {window}"
            )
            if window < 0:
                rotated[chosen] = start + inside
                continue
            numbers, rest = np.divmod(start + inside, self._block)
            blocks = permute(numbers, size=self._num_full, seed=seed, epoch=epoch, purpose="blocks")
            rotated[chosen] = blocks * self._block + rest
        return (rotated + self._rotation(seed, epoch)) % self._size

    def _rotation(self, seed: int, epoch: int) -> int:
        return int(key_of("rotation", seed, epoch)) % self._size

    def ranges_near(self, position: int, *, seed: int) -> tuple[int, list[tuple[int, int]]]:
        """The window of a position, counted over all epochs, and the stored ranges [start, stop) that it reads."""
        epoch, place = divmod(position, self._size)
        span, whole = self._window * self._block, self._num_full * self._block
        per_epoch = -(-whole // span) + 1
        rotation = self._rotation(seed, epoch)
        if place >= whole:
            return epoch * per_epoch + per_epoch - 1, self._wrapped(whole + rotation, self._size - whole)
        window = place // span
        numbers = np.arange(window * self._window, min((window + 1) * self._window, self._num_full))
        blocks = permute(numbers, size=self._num_full, seed=seed, epoch=epoch, purpose="blocks")
        ranges = [
            part for block in blocks.tolist() for part in self._wrapped(block * self._block + rotation, self._block)
        ]
        return epoch * per_epoch + window, ranges

    def _wrapped(self, start: int, length: int) -> list[tuple[int, int]]:
        start %= self._size
        stop = start + length
        return [(start, stop)] if stop <= self._size else [(start, self._size), (0, stop - self._size)]


class Balanced:
    """Every identity once per C positions; its images take turns, each once before any comes again.

    Which images an epoch of N positions shows depends on the balance, so "every sample once per epoch" does not hold:
    images of small identities are seen more often, those of large ones less.

    Args:
        labels: (N,) class of each sample.
        num_classes: C; every class has a sample.
    """

    def __init__(self, labels: NDArray[np.int64], num_classes: int) -> None:
        self._classes = num_classes
        self._by_class, self._starts = _grouped(labels, num_classes)
        self._counts = np.diff(self._starts)
        if not self._counts.all():
            raise DataError(
                f"Class {int(np.argmin(self._counts))} has no image, so that a balanced order cannot show it; "
                "pack again without it."
            )

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """See `Order`."""
        rounds, places = np.divmod(positions, self._classes)
        identity = np.empty_like(positions)
        for number in np.unique(rounds):
            chosen = rounds == number
            identity[chosen] = permute(
                places[chosen], size=self._classes, seed=seed, epoch=int(number), purpose="identities"
            )
        counts = self._counts[identity]
        cycles, turns = np.divmod(rounds, counts)
        keys = mix(mix(identity.astype(np.uint64) ^ key_of("images", seed)) ^ cycles.astype(np.uint64))
        drawn: NDArray[np.int64] = self._by_class[self._starts[identity] + permute_each(turns, counts, keys)]
        return drawn


class Weighted:
    """Identities drawn in proportion to their weight, an image of theirs evenly: with replacement.

    Nothing is promised about how often a sample is seen in an epoch, but its expectation.

    Args:
        labels: (N,) class of each sample.
        weights: (C,) non-negative weight of each class.
    """

    def __init__(self, labels: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        self._by_class, self._starts = _grouped(labels, len(weights))
        self._counts = np.diff(self._starts)
        self._edges = np.cumsum(np.where(self._counts > 0, weights, 0))
        if not self._edges[-1] > 0:
            raise DataError("All weights of data.order are 0, so that nothing can be drawn; give some identities more.")

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """See `Order`."""
        first = mix(mix(positions.astype(np.uint64) ^ key_of("identity", seed)))
        second = mix(mix(positions.astype(np.uint64) ^ key_of("image", seed)))
        share = (first >> np.uint64(11)).astype(np.float64) * 2.0**-53
        identity = np.searchsorted(self._edges, share * self._edges[-1], side="right")
        image = (second % self._counts[identity].astype(np.uint64)).astype(np.int64)
        drawn: NDArray[np.int64] = self._by_class[self._starts[identity] + image]
        return drawn


def _grouped(labels: NDArray[np.int64], num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples by class, ascending in each, and where each of the C classes begins, with N at the end.

    Sorting labels and numbers as one integer is ten times as fast as a stable argsort of 12 million labels.
    """
    bits = len(labels).bit_length()
    joined = np.sort(labels << bits | np.arange(len(labels)))
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=num_classes))])
    return joined & ((1 << bits) - 1), starts


def build_order(
    config: OrderConfig,
    num_samples: int,
    *,
    labels: Callable[[], NDArray[np.int64]],
    names: Callable[[], Sequence[str]],
) -> Order:
    """The order that a configuration asks for.

    Args:
        config: `data.order`.
        num_samples: N.
        labels: gives the (N,) class of each sample, where the order needs it.
        names: gives the identity of each class.

    Raises:
        DataError: a file of weights that does not fit.
    """
    match config:
        case RandomOrder():
            return Random(num_samples)
        case BlockOrder():
            return Blocks(num_samples, block=config.block_samples, window=config.window_blocks)
        case BalancedOrder():
            values = labels()
            return Balanced(values, int(values.max()) + 1)
        case WeightedOrder():
            if config.weights is not None:
                return Weighted(labels(), read_weights(Path(config.weights), names()))
            values = labels()
            return Weighted(values, np.bincount(values).astype(np.float64) ** config.power)


def read_weights(path: Path, names: Sequence[str]) -> NDArray[np.float64]:
    """(C,) weights from `identity,weight` lines; identities that are not listed have weight 1.

    Raises:
        DataError: unreadable, an unknown identity, or a weight that is no finite number of at least 0.
    """
    place = {name: index for index, name in enumerate(names)}
    weights = np.ones(len(names))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.order.weights = {path} cannot be read: {error}.") from error
    for number, row in enumerate(rows, start=1):
        where = f"data.order.weights = {path}, line {number}"
        if number == 1 and row == ["identity", "weight"]:
            continue
        if len(row) != 2:
            raise DataError(f"{where}: expected identity,weight, found {','.join(row)!r}.")
        if row[0] not in place:
            raise DataError(f"{where}: the shards have no identity {row[0]!r}.")
        try:
            weight = float(row[1])
        except ValueError:
            weight = -1.0
        if not (np.isfinite(weight) and weight >= 0):
            raise DataError(f"{where}: the weight {row[1]!r} is no finite number of at least 0.")
        weights[place[row[0]]] = weight
    return weights
