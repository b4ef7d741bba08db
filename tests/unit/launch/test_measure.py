import time

from launch.measure import interleave, machine, ratio


def spin(seconds: float, items: int) -> int:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return items


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    calls: list[str] = []
    found = interleave(
        {"a": lambda: calls.append("a") or 3, "b": lambda: calls.append("b") or 5},
        rounds=2,
    )
    assert calls == ["a", "b"] * 3
    assert [(m.name, m.items, len(m.rounds)) for m in found] == [("a", 3, 2), ("b", 5, 2)]


def test_the_ratio_counts_items_per_cpu_second():
    fast, slow = interleave({"fast": lambda: spin(0.05, 40), "slow": lambda: spin(0.05, 10)}, rounds=3)
    assert 3 < ratio(fast, slow) < 5
    assert 0.045 < slow.cpu_s < 0.2


def test_the_machine_names_what_ran():
    found = machine("numpy", "no-such-package")
    assert found["cores"] >= 1
    assert found["packages"]["numpy"]
    assert found["packages"]["no-such-package"] is None
