"""What a run tells about itself: metrics.jsonl with fixed keys, TensorBoard beside it, one line or bar for people."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from aroface.engine.evaluation import EvaluationLine
from aroface.files import atomic_path, writing

__all__ = ["METRICS_FILE", "MetricsLine", "MetricsLog", "Meter", "TrainingProgress", "peak_memory_gib"]

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricsLine:
    """One line of metrics.jsonl: means since the line before, except where said."""

    step: int  #: optimiser steps taken
    samples: int  #: images seen over all ranks
    loss: float
    lr: float  #: of the last step
    grad_norm: float | None  #: of the last step, before clipping; null where an fp16 overflow skipped it
    img_per_s: float  #: over all ranks
    data_wait_s: float  #: seconds per step that rank 0 waited for a batch
    attack_s: float  #: seconds per step in the alignment, on the host of rank 0
    memory_gib: float  #: peak of rank 0: of the GPU, else of the process


class MetricsLog:
    """Appends lines; on resume it first drops those of later steps, so that no step stands twice.

    Args:
        run: run directory.
        resumed_step: step of the checkpoint that the run continues from; 0 starts afresh.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, run: Path, *, resumed_step: int, tensorboard: bool) -> None:
        self._path = run / METRICS_FILE
        if self._path.is_file():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step(line) <= resumed_step]
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, line: MetricsLine) -> None:
        """Append one line."""
        values = asdict(line)
        self._append(values, {key: value for key, value in values.items() if key not in {"step", "samples"}}, line.step)

    def write_evaluation(self, line: EvaluationLine) -> None:
        """Append what one set gave; to be told from the other lines by its key `evaluation`."""
        curves = {f"{line.evaluation}/{key}": value for key, value in line.metrics.items()}
        self._append(asdict(line), curves, line.step)

    def _append(self, values: Mapping[str, Any], curves: Mapping[str, float | None], step: int) -> None:
        with writing(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")
            for key, value in curves.items() if self._board is not None else ():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush TensorBoard. A disk that fails now does not hide the error that training ended with."""
        if self._board is None:
            return
        try:
            self._board.close()
        except OSError as error:
            logger.warning("The last TensorBoard events could not be written: %s.", error)


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a crash cut short


class Meter:
    """Sums between two log lines; the loss stays on its device until it is asked for."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._loss: torch.Tensor | None = None
        self._steps, self._images, self._wait_s, self._attack_s = 0, 0, 0.0, 0.0
        self._started = time.perf_counter()

    def add(self, *, loss: torch.Tensor, images: int, wait_s: float, attack_s: float) -> None:
        """Count one optimiser step."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        self._steps += 1
        self._images += images
        self._wait_s += wait_s
        self._attack_s += attack_s

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count as training."""
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def line(self, *, step: int, samples: int, lr: float, grad_norm: float) -> MetricsLine:
        """The means since the last line; starts anew. One host synchronisation."""
        assert self._loss is not None  # noqa: S101 - `add` comes first
        elapsed = time.perf_counter() - self._started
        line = MetricsLine(
            step=step,
            samples=samples,
            loss=round(float(self._loss) / self._steps, 6),
            lr=lr,
            grad_norm=round(grad_norm, 6) if math.isfinite(grad_norm) else None,
            img_per_s=round(self._images / elapsed, 2),
            data_wait_s=round(self._wait_s / self._steps, 6),
            attack_s=round(self._attack_s / self._steps, 6),
            memory_gib=round(peak_memory_gib(), 3),
        )
        self._clear()
        return line


def peak_memory_gib() -> float:
    """Largest memory so far: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TrainingProgress:
    """A bar on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

    def __init__(self, *, total_steps: int, first_step: int, is_shown: bool) -> None:
        self._total, self._is_shown = total_steps, is_shown
        self._bar: Progress | None = None
        if is_shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, text="")
        self._say: Callable[[str], None] = logger.info

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, line: MetricsLine, *, images_per_step: int) -> None:
        """Tell one metrics line."""
        if not self._is_shown:
            return
        text = f"loss {line.loss:7.3f}  lr {line.lr:.4f}  {line.img_per_s:6.0f} img/s"
        if self._bar:
            self._bar.update(self._task, completed=line.step, text=text)
            return
        left_s = (self._total - line.step) * images_per_step / max(line.img_per_s, 1e-9)
        self._say(f"step {line.step:6d}/{self._total}  {text}  {left_s / 60:5.1f} min left")
