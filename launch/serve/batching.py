"""Requests that come one at a time, worked on together: a batch is everything that waits when the worker is free.

Nothing waits for a batch to fill. While one batch is computed the next gathers, so that a single request is answered at
once and many are answered together.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Batcher", "QueueFullError"]

In = TypeVar("In")
Out = TypeVar("Out")


class QueueFullError(RuntimeError):
    """More requests wait than are allowed to; the caller should try again later."""


class Batcher(Generic[In, Out]):
    """One thread that answers queued items in batches, in order.

    Args:
        work: answers a batch; as many results as items. An exception as a result is raised for that item alone, one
            that is raised for all of them.
        name: of the thread.
        max_batch: items of a batch at the most.
        max_queue: items that may wait; more are refused.
        on_batch: called with the size of a batch and the seconds it took.
    """

    def __init__(
        self,
        work: Callable[[Sequence[In]], Sequence[Out | Exception]],
        *,
        name: str,
        max_batch: int,
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._work, self._max_batch, self._max_queue, self._on_batch = work, max_batch, max_queue, on_batch
        self._waiting: deque[tuple[In, Future[Out]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Items that wait now."""
        return len(self._waiting)

    def submit(self, item: In) -> "Future[Out]":
        """Queue one item.

        Raises:
            QueueFullError: too many wait, or the batcher is closed.
        """
        future: Future[Out] = Future()
        with self._changed:
            if self._is_closed or len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting; try again in a moment.")
            self._waiting.append((item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Refuse new items, finish those that wait, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
            # A caller that has gone away cancelled its future; nobody computes for it.
            live = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]
            if live:
                self._answer([item for item, _ in live], [future for _, future in live])

    def _answer(self, items: Sequence[In], futures: "Sequence[Future[Out]]") -> None:
        started = time.perf_counter()
        try:
            results = self._work(items)
            for future, result in zip(futures, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        except BaseException as error:  # whatever it was, every caller must hear of it, and the thread must live on
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        self._on_batch(len(items), time.perf_counter() - started)
