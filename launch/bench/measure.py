"""Time and memory of several ways to do one thing, measured side by side."""

import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

__all__ = ["Measurement", "PeakMemory", "interleave", "machine", "own_memory", "peak_growth", "ratio", "synchronise"]


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds of one variant."""

    name: str
    items: int  #: per round
    wall_s: float
    cpu_s: float  #: of this process and the children it has waited for
    rounds: tuple[tuple[float, float], ...]  #: (wall, CPU) seconds of each round

    @property
    def items_per_cpu_s(self) -> float:
        """Items per second of CPU time."""
        return self.items / max(self.cpu_s, 1e-9)

    @property
    def items_per_s(self) -> float:
        """Items per second of wall time."""
        return self.items / max(self.wall_s, 1e-9)


def interleave(
    variants: Mapping[str, Callable[[], int]],
    *,
    rounds: int,
    on_round: Callable[[str, int], None] = lambda name, number: None,
) -> list[Measurement]:
    """Run every variant once per round, after one round that is not counted.

    Args:
        variants: name -> a function that does the work and returns the number of items done.
        rounds: counted rounds, at least 1.
        on_round: called with name and round number (0: warm-up) before each run.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    items: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, work in variants.items():
            on_round(name, number)
            wall, cpu = time.perf_counter(), _cpu_s()
            items[name] = work()
            if number:
                times[name].append((time.perf_counter() - wall, _cpu_s() - cpu))
    return [
        Measurement(
            name=name,
            items=items[name],
            wall_s=statistics.median(wall for wall, _ in measured),
            cpu_s=statistics.median(cpu for _, cpu in measured),
            rounds=tuple(measured),
        )
        for name, measured in times.items()
    ]


def ratio(faster: Measurement, slower: Measurement) -> float:
    """Median over rounds of how many times more items per CPU-second `faster` does than `slower`."""
    return statistics.median(
        (faster.items / max(fast, 1e-9)) / (slower.items / max(slow, 1e-9))
        for (_, fast), (_, slow) in zip(faster.rounds, slower.rounds, strict=True)
    )


def _cpu_s() -> float:
    times = os.times()  # whole clock ticks, while the own time comes in nanoseconds
    return time.process_time() + times.children_user + times.children_system


class PeakMemory:
    """Largest own memory of this process while the block runs, in bytes: what the system cannot take back.

    Pages of mapped files are not counted, because the system drops them when memory is short. Sampled every 20 ms;
    where there is no /proc it is the largest resident size instead.
    """

    bytes = 0

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, own_memory())
            if self._stop.wait(0.02):
                return


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grows at the worst moment of `work`.

    Linux keeps that moment itself, so short peaks count too; elsewhere memory is sampled. Memory that earlier work left
    with the allocator is handed back before.
    """
    marker, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        marker.write_text("5", encoding="ascii")  # forgets the peak so far
    except (OSError, AttributeError):
        with PeakMemory() as before:
            pass
        with PeakMemory() as peak:
            work()
        return peak.bytes - before.bytes

    def field(name: str) -> int:
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    start = field("VmRSS")
    work()
    return field("VmHWM") - start


def synchronise(device: "torch.device") -> None:
    """Wait for the device, if it is a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_memory() -> int:
    """Memory of this process that the system cannot take back, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory and the versions of Python and of `packages`, for result files."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
