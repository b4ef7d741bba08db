"""What a step spends its time on: the operations with the largest share, and the time in which the device waits."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.output import Report

if TYPE_CHECKING:
    import torch

__all__ = ["Largest", "add_profile", "largest"]

_STEPS, _COUNT = 3, 5


@dataclass(frozen=True)
class Largest:
    """One operation of the CPU or kernel of the GPU."""

    name: str
    share: float  #: of the wall time of the steps, its children not counted
    calls: int  #: per step


def largest(
    step: Callable[[], object], device: "torch.device", *, trace: Path | None = None
) -> tuple[list[Largest], float]:
    """Run a few steps under torch.profiler.

    Args:
        step: waits for the device before it returns.
        device: whose time counts.
        trace: file for chrome://tracing, compressed if its name ends in .gz.

    Returns:
        Every operation, the largest first, and the share of the wall time in which none of them ran. Measuring
        lengthens the steps, most of all what the host does, so that share is an upper bound.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    with profile(activities=activities) as found:
        start = time.perf_counter()
        for _ in range(_STEPS):
            step()
        elapsed_us = 1e6 * (time.perf_counter() - start)
    if trace is not None:
        found.export_chrome_trace(str(trace))

    def own_us(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = [event for event in found.key_averages() if own_us(event) > 0]
    if on_gpu:  # operations of the host repeat the time of their kernels
        events = [event for event in events if str(event.device_type).endswith("CUDA") and not _is_label(event)]
    entries = [Largest(event.key, own_us(event) / elapsed_us, event.count // _STEPS) for event in events]
    return sorted(entries, key=lambda entry: -entry.share), max(0.0, 1 - sum(entry.share for entry in entries))


def _is_label(event: Any) -> bool:
    """A range with a name, such as the step of an optimiser, which spans kernels that count for themselves."""
    return bool(getattr(event, "is_user_annotation", False))


def add_profile(report: Report, ways: Mapping[str, Callable[[], object]], path: Path, device: "torch.device") -> None:
    """Print the five largest of each way and note all of them; the traces are one file a way, WAY-`path`."""
    profiles = report.details.setdefault("profiles", {})
    for name, step in ways.items():
        trace = path.with_name(f"{name.replace(' ', '-')}-{path.name}")
        trace.parent.mkdir(parents=True, exist_ok=True)
        entries, waiting = largest(step, device, trace=trace)
        for rank, entry in enumerate(entries[:_COUNT], 1):
            report.add(f"{name}, {rank}. {entry.name[:60]}", 100 * entry.share, "% of a step")
        report.add(f"{name}, nothing runs at most", 100 * waiting, "% of a step")
        profiles[name] = {"entries": [asdict(entry) for entry in entries[:30]], "waiting": waiting}
