"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress", "StagedProgress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager whose `update(done)` takes the number of items done so far.

    Args:
        name: what is being done, such as `Embed`.
        total: items in all.
        unit: what is counted, in the plural.
        done_before: items that an earlier run did, which say nothing about the rate.
    """

    def __init__(self, name: str, *, total: int, unit: str, done_before: int = 0) -> None:
        self._name = name
        self._total = total
        self._unit = unit
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._done_before = done_before
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
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
            line = f"{self._name}: {done:,} of {self._total:,} {self._unit}"
            if done > self._done_before:
                rate = (done - self._done_before) / max(now - self._started, 1e-9)
                left = f", {_duration((self._total - done) / rate)} left" if done < self._total else ""
                line += f", {rate:,.1f}/s{left}"
            self._console.print(line, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class StagedProgress:
    """Progress of stages that follow one another, each with its own name and total.

    Args:
        unit: what is counted, in the plural.
    """

    def __init__(self, *, unit: str) -> None:
        self._unit = unit
        self._name = ""
        self._stage: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def update(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` items of stage `name` are done; another name begins another stage."""
        if self._stage is None or name != self._name:
            self._close()
            self._name = name
            self._stage = Progress(name, total=total, unit=self._unit, done_before=done).__enter__()
        self._stage.update(done)

    def _close(self) -> None:
        if self._stage is not None:
            self._stage.__exit__(None, None, None)
            self._stage = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
