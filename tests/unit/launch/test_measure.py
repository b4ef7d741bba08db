import os

import pytest

from launch.bench.measure import interleave, machine, ratio


class Clock:
    """Stands in for the time of this process: work costs what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.cpu_s = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.wall_s)
        monkeypatch.setattr("time.process_time", lambda: self.cpu_s / 4)  # the rest of it in children
        monkeypatch.setattr("os.times", lambda: os.times_result((9.0, 9.0, self.cpu_s / 4, self.cpu_s / 2, 0.0)))

    def spend(self, cpu_s: float, items: int) -> int:
        self.cpu_s += cpu_s
        self.wall_s += 2 * cpu_s
        return items


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    calls: list[str] = []
    found = interleave(
        {"a": lambda: calls.append("a") or 3, "b": lambda: calls.append("b") or 5},
        rounds=2,
    )
    assert calls == ["a", "b"] * 3
    assert [(m.name, m.items, len(m.rounds)) for m in found] == [("a", 3, 2), ("b", 5, 2)]


def test_the_ratio_counts_items_per_cpu_second(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    neighbour = iter([9.0, 1.0, 3.0, 2.0])  # a busy machine slows all the variants of one round
    load = [0.0]

    def fast() -> int:
        load[0] = next(neighbour)
        return clock.spend(0.5 * load[0], 40)

    quick, slow = interleave({"fast": fast, "slow": lambda: clock.spend(0.5 * load[0], 10)}, rounds=3)
    assert ratio(quick, slow) == pytest.approx(4)
    assert (quick.cpu_s, quick.wall_s) == pytest.approx((1.0, 2.0))  # the medians, without the first round
    assert slow.items_per_cpu_s == pytest.approx(10)
    assert slow.items_per_s == pytest.approx(5)


def test_the_machine_names_what_ran():
    found = machine("numpy", "no-such-package")
    assert found["cores"] >= 1
    assert found["packages"]["numpy"]
    assert found["packages"]["no-such-package"] is None
