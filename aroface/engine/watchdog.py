"""Ends a process that makes no progress: a job that hangs costs more than one that stops."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

__all__ = ["Watchdog"]

_USER_ERROR = 2


def _exit() -> None:
    sys.stderr.flush()
    os._exit(_USER_ERROR)  # the training thread hangs: it cannot be asked


class Watchdog:
    """A context manager; inside it `beat` has to be called at least every `timeout_s` seconds.

    A collective that waits for a hung rank fails by itself after `engine.timeout_s`. This is for everything else: a
    read from a dead file system, a kernel that never ends, a collective that does not keep its own time.

    Args:
        timeout_s: seconds without a beat after which the process prints where each thread stands, and ends.
        on_expiry: called instead of the end of the process, for tests.
    """

    def __init__(self, timeout_s: float, *, on_expiry: Callable[[], None] = _exit) -> None:
        self._timeout_s, self._on_expiry = timeout_s, on_expiry
        self._stopped = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Tell that something was done."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._last > self._timeout_s:
                sys.stderr.write(
                    f"aroface train: no step was finished for {self._timeout_s:.0f} s (2 x engine.timeout_s); this "
                    "rank ends. The newest checkpoint is good: find out below what hangs, and give the same command "
                    "again. Raise engine.timeout_s if a step may take that long.\n"
                )
                faulthandler.dump_traceback(all_threads=True)
                self._on_expiry()
                return
