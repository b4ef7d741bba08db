"""What this machine reaches at best: the peaks that a limit is made of, measured in a few seconds.

No work is faster than its arithmetic at the peak of the processor or its data at the bandwidth of the memory, whichever
takes longer (Williams, Waterman and Patterson, "Roofline", CACM 2009). The peaks are not read from a data sheet but
measured: the fastest of several square matrix products in each precision, and the faster of copying and of reading an
array that no cache holds. A limit therefore is what this machine, on this day, beside these neighbours, has been seen
to do. Work that stays in a cache, or that needs fewer operations than were counted (Winograd's convolution), can pass
it.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from launch.bench.output import Report
from launch.evaluate_options import positive
from launch.outputs import output_file

__all__ = ["Peaks", "Precision", "add_arguments", "measure_peaks", "run"]

Precision = Literal["fp32", "bf16", "fp16", "int8"]
_CPU_SIDES, _GPU_SIDES = (512, 1024, 2048), (4096, 8192)
_CPU_BYTES, _GPU_BYTES = 1 << 28, 1 << 30  # larger than any cache
_BUDGET_S = 0.25  # of each measurement
_LONGEST_S = 1.0  # of one product
_WARM_UP = 1


@dataclass(frozen=True)
class Peaks:
    """Highest rates of one device."""

    device: str  #: `cpu`, or the name of the card
    threads: int  #: that worked together; 1 on a GPU
    clock: Literal["cpu", "wall"]  #: whose seconds: of CPU time, summed over the threads, or of the clock on the wall
    flops_per_s: Mapping[Precision, float]  #: of matrix products; a multiplication and an addition count as two
    bytes_per_s: float  #: read plus written

    def limit_s(self, flops: float = 0.0, moved_bytes: float = 0.0, precision: Precision = "fp32") -> float:
        """Least seconds of `clock`: max(flops / peak, bytes / bandwidth).

        Args:
            flops: multiplications plus additions that the result needs.
            moved_bytes: that memory has to deliver or take, each once.
            precision: of the arithmetic; one that was not measured here (fp16 on a CPU) is computed in fp32.
        """
        peak = self.flops_per_s.get(precision, self.flops_per_s["fp32"])
        return max(flops / peak, moved_bytes / self.bytes_per_s)


def measure_peaks(
    *, threads: int = 1, device: str = "cpu", clock: Literal["cpu", "wall"] = "cpu", budget_s: float = _BUDGET_S
) -> Peaks:
    """Measure for about a second on one thread, longer where a precision is slow.

    Args:
        threads: of the CPU; the setting of PyTorch is put back afterwards.
        device: `cpu` or `cuda`.
        clock: of the CPU; a GPU has events of its own, in wall time.
        budget_s: seconds that each measurement repeats for.
    """
    import torch

    if device != "cpu":
        peaks = _measure(device, torch.cuda.get_device_name(device), 1, "wall", budget_s)
        torch.cuda.empty_cache()
        return peaks
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measure("cpu", "cpu", threads, clock, budget_s)
    finally:
        torch.set_num_threads(before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: the GPU where there is one)")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    from aroface.errors import ConfigError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here. Leave the option out to measure the CPU.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    peaks = measure_peaks(threads=args.threads, device=device)
    report = Report("machine", ("torch", "numpy"), {"device": peaks.device, "threads": peaks.threads})
    second = "CPU-second" if peaks.clock == "cpu" else "second"
    for precision, rate in peaks.flops_per_s.items():
        report.add(f"{precision} matrix product", rate / 1e9, f"GFLOP per {second}")
    report.add("memory, read and written", peaks.bytes_per_s / 1e9, f"GB per {second}")
    report.write(args.out)
    return 0


def _measure(device: str, name: str, threads: int, clock: Literal["cpu", "wall"], budget_s: float) -> Peaks:
    timed = _device_timer(budget_s) if device != "cpu" else _host_timer(clock, budget_s)
    precisions: list[Precision] = ["fp32", "bf16", "int8"]
    if device != "cpu":
        precisions.append("fp16")
    rates = {precision: _product_rate(precision, device, timed) for precision in precisions}
    found = {precision: rate for precision, rate in rates.items() if rate is not None}
    return Peaks(name, threads, clock, found, _memory_rate(device, timed))


def _product_rate(precision: Precision, device: str, timed: "_Timer") -> float | None:
    """Operations per second of the best side of a square product; None where PyTorch has no such product."""
    best = 0.0
    for side in _CPU_SIDES if device == "cpu" else _GPU_SIDES:
        operations = 2 * side**3
        if best and operations / best > _LONGEST_S:
            break  # no units for this precision: minutes of the same rate would follow
        try:
            best = max(best, operations / timed(_product(precision, side, device)))
        except (RuntimeError, NotImplementedError):
            return None
    return best


def _product(precision: Precision, side: int, device: str) -> Callable[[], object]:
    import torch

    if precision == "int8":
        left, right = (torch.randint(-9, 10, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(left, right)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right


def _memory_rate(device: str, timed: "_Timer") -> float:
    """Bytes per second of the faster of a copy and of reading two arrays once."""
    import torch

    one, two = (torch.ones((_CPU_BYTES if device == "cpu" else _GPU_BYTES) // 4, device=device) for _ in range(2))
    copy, read = timed(lambda: one.copy_(two)), timed(lambda: torch.dot(one, two))
    return 2 * one.nbytes / min(copy, read)


#: Fewest seconds of one call of a piece of work.
_Timer = Callable[[Callable[[], object]], float]


def _host_timer(clock: Literal["cpu", "wall"], budget_s: float) -> _Timer:
    now = time.process_time if clock == "cpu" else time.perf_counter

    def timed(work: Callable[[], object]) -> float:
        times: list[float] = []
        end = time.perf_counter() + budget_s
        while len(times) <= _WARM_UP or time.perf_counter() < end:
            start = now()
            work()
            times.append(now() - start)
        return max(1e-9, min(times[_WARM_UP:]))

    return timed


def _device_timer(budget_s: float) -> _Timer:
    def timed(work: Callable[[], object]) -> float:
        import torch

        times: list[float] = []
        end = time.perf_counter() + budget_s
        while len(times) <= _WARM_UP or time.perf_counter() < end:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return max(1e-9, min(times[_WARM_UP:]))

    return timed
