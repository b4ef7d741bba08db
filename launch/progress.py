"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager whose `update(done)` takes the number of items done so far.

    Args:
        name: what is being done, such as `Embed`.
        total: items in all.
        unit: what is counted, in the plural.
    """

    def __init__(self, name: str, *, total: int, unit: str) -> None:
        self._name = name
        self._total = total
        self._unit = unit
        self._console = Console(stderr=True, highlight=False)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total)
        self._started = self._last_line = time.monotonic()
        return self

    def update(self, done: int) -> None:
        """Show that `done` of the items are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if done == self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = done / max(now - self._started, 1e-9)
            self._console.print(f"{self._name}: {done}/{self._total} {self._unit}, {rate:.1f}/s", soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
