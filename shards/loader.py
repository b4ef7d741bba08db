"""Batches from a shard data set: threads of the training process decode ahead, straight into uint8 arrays.

The JPEG decoder releases the interpreter lock, so threads scale and no batch crosses a process boundary; measured on
112-px faces that is twice the images per CPU-second of worker processes.
"""

import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from aroface.types import Batch

__all__ = ["Readable", "in_background", "iterate_batches"]

_PREFETCHED_BATCHES = 3

_Item = TypeVar("_Item")


class Readable(Protocol):
    """What the loader asks of a data set."""

    @property
    def image_size(self) -> int:
        """Side of the delivered images in pixels."""
        ...

    @property
    def workers(self) -> int:
        """Decoding threads."""
        ...

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """Samples at stream positions."""
        ...

    def fill(self, samples: NDArray[np.int64], images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Decode samples into the rows of a batch."""
        ...

    def read_ahead(self, position: int, *, seed: int) -> None:
        """A hint that the stream has come to a position."""
        ...


def iterate_batches(
    dataset: Readable,
    *,
    seed: int,
    start_position: int,
    num_batches: int,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Micro-batches of one rank, in order.

    Batch b holds the positions start + b * batch_size * world_size + rank + i * world_size, i in [0, batch_size), so
    that all ranks together walk through the stream without a gap. Closing the iterator stops the threads.

    Args:
        dataset: the shards.
        seed: of the order.
        start_position: global position of the first sample of the first batch.
        num_batches: batches to deliver.
        batch_size: images per batch and rank.
        rank: this rank, in [0, world_size).
        world_size: ranks that share the stream.

    Raises:
        DataError: more unreadable samples than the data set tolerates.
    """
    lanes = np.arange(batch_size, dtype=np.int64) * world_size + rank
    pin = torch.cuda.is_available()
    pieces = max(1, min(dataset.workers, batch_size))
    buffers = _Buffers()

    def start(batch: int) -> tuple[Batch, list[Future[None]]]:
        positions = start_position + batch * batch_size * world_size + lanes
        dataset.read_ahead(int(positions[-1]), seed=seed)
        samples = dataset.samples_at(positions, seed=seed)
        size = dataset.image_size
        shape = (batch_size, size, size, 3)
        images = (
            torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pin else torch.from_numpy(buffers.take(shape))
        )
        labels = torch.empty(batch_size, dtype=torch.int64, pin_memory=pin)
        image_rows, label_rows = images.numpy(), labels.numpy()
        futures = [
            pool.submit(dataset.fill, samples[part], image_rows[part], label_rows[part])
            for part in (slice(i, None, pieces) for i in range(pieces))
        ]
        return Batch(images, labels, torch.from_numpy(samples)), futures

    pool = ThreadPoolExecutor(dataset.workers, thread_name_prefix="decode")
    try:
        running: deque[tuple[Batch, list[Future[None]]]] = deque()
        for batch in range(num_batches):
            running.append(start(batch))
            if len(running) > _PREFETCHED_BATCHES:
                yield _finished(*running.popleft())
        while running:
            yield _finished(*running.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Buffers:
    """Arrays that are used again once nobody refers to them: fresh memory costs a page fault per 4 KiB."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        for index in range(len(self._arrays)):
            # Two references are ours: the list's, and the argument of the call. Views and tensors hold others.
            if sys.getrefcount(self._arrays[index]) == 2:
                return self._arrays[index]
        self._arrays.append(np.empty(shape, np.uint8))
        return self._arrays[-1]


def _finished(batch: Batch, futures: list[Future[None]]) -> Batch:
    for future in futures:
        future.result()
    return batch


def in_background(items: Iterator[_Item], *, depth: int) -> Iterator[_Item]:
    """Run an iterator in a thread, `depth` items ahead. Closing the result stops the thread."""
    ready: queue.Queue[tuple[_Item | None, BaseException | None]] = queue.Queue(depth)
    is_closed = threading.Event()

    def put(item: _Item | None, error: BaseException | None) -> None:
        while not is_closed.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in items:
                put(item, None)
                if is_closed.is_set():
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, None)

    thread = threading.Thread(target=run, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        is_closed.set()
        thread.join()
