import math

import pytest
import torch

from launch.bench import roofline
from launch.bench.roofline import Peaks, measure_peaks

PEAKS = Peaks("cpu", 1, "cpu", {"fp32": 100.0, "bf16": 400.0}, bytes_per_s=10.0)


def test_a_limit_is_the_longer_of_arithmetic_and_traffic():
    assert PEAKS.limit_s(flops=200.0, moved_bytes=10.0) == 2.0
    assert PEAKS.limit_s(flops=200.0, moved_bytes=50.0) == 5.0
    assert PEAKS.limit_s(flops=200.0, moved_bytes=1.0, precision="bf16") == 0.5
    assert PEAKS.limit_s() == 0.0


def test_a_precision_without_a_peak_is_computed_in_fp32():
    assert PEAKS.limit_s(flops=300.0, precision="fp16") == PEAKS.limit_s(flops=300.0) == 3.0


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_measured_peaks_are_rates(monkeypatch: pytest.MonkeyPatch, clock: str):
    monkeypatch.setattr(roofline, "_CPU_SIDES", (64, 128))
    monkeypatch.setattr(roofline, "_CPU_BYTES", 1 << 20)
    threads = torch.get_num_threads()
    peaks = measure_peaks(threads=2, clock=clock, budget_s=0.01)
    assert torch.get_num_threads() == threads
    assert (peaks.device, peaks.threads, peaks.clock) == ("cpu", 2, clock)
    assert {"fp32", "bf16"} <= set(peaks.flops_per_s)
    assert all(math.isfinite(rate) and rate > 0 for rate in (*peaks.flops_per_s.values(), peaks.bytes_per_s))


def test_no_larger_product_follows_one_that_says_that_it_would_take_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "_product", lambda precision, side, device: lambda: side)
    for rate, sides in ((1e9, [512]), (3e9, [512, 1024]), (1e12, [512, 1024, 2048])):
        seen: list[int] = []

        def timed(work, rate=rate, seen=seen) -> float:
            seen.append(work())
            return 2 * seen[-1] ** 3 / rate

        assert roofline._product_rate("bf16", "cpu", timed) == pytest.approx(rate)
        assert seen == sides


def test_the_fastest_call_counts_and_the_first_never(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    costs = iter([1.0, 8.0, 5.0, 7.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(costs)

    assert roofline._host_timer("wall", budget_s=26.0)(work) == 5.0
