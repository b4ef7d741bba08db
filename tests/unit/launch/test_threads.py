"""Threads follow the idle cores."""

import os

import pytest

from launch import threads


@pytest.mark.parametrize(("idle_cores", "expected"), [(0.0, 1), (0.4, 1), (1.2, 1), (1.9, 2), (1000.0, None)])
def test_threads_are_the_idle_cores_within_limits(monkeypatch, idle_cores, expected):
    ticks = iter([100, 100 + int(idle_cores * 0.5 * os.sysconf("SC_CLK_TCK"))])
    monkeypatch.setattr(threads, "_idle_ticks", lambda: next(ticks))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    available = len(os.sched_getaffinity(0))
    assert threads.free_cores() == (available if expected is None else min(available, expected))


def test_without_proc_all_cores_are_taken(monkeypatch):
    monkeypatch.setattr(threads, "_idle_ticks", lambda: None)
    assert threads.free_cores() == len(os.sched_getaffinity(0))
