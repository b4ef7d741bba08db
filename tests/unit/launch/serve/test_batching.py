"""The batcher: everything that waits goes together, and nobody's error is another's."""

import threading

import pytest

from launch.serve.batching import Batcher, QueueFullError


class Gate:
    """Work that stops at the first batch until it is opened, so that tests know what waits."""

    def __init__(self):
        self.opened, self.reached, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, items):
        self.batches.append(list(items))
        self.reached.set()
        assert self.opened.wait(30)
        return [ValueError(item) if item < 0 else 10 * item for item in items]


@pytest.fixture
def gate():
    return Gate()


def held_batcher(gate, **options):
    batcher = Batcher(gate, name="test", **({"max_batch": 4, "max_queue": 8} | options))
    first = batcher.submit(0)
    assert gate.reached.wait(30)
    return batcher, first


def test_what_waits_is_answered_together_in_order(gate):
    sizes = []
    batcher, first = held_batcher(gate, on_batch=lambda size, seconds: sizes.append(size))
    futures = [batcher.submit(item) for item in range(1, 7)]
    assert batcher.depth == 6
    gate.opened.set()
    assert [future.result(30) for future in (first, *futures)] == [0, 10, 20, 30, 40, 50, 60]
    batcher.close()
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert sizes == [1, 4, 2]


def test_an_error_of_one_item_is_its_own(gate):
    batcher, _ = held_batcher(gate)
    good, bad = batcher.submit(1), batcher.submit(-1)
    gate.opened.set()
    assert good.result(30) == 10
    with pytest.raises(ValueError, match="-1"):
        bad.result(30)
    batcher.close()


def test_a_failing_batch_fails_all_its_items_and_the_next_goes_on():
    def work(items):
        if 1 in items:
            raise RuntimeError("broken")
        return items

    batcher = Batcher(work, name="test", max_batch=1, max_queue=8)
    bad, good = batcher.submit(1), batcher.submit(2)
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(30)
    assert good.result(30) == 2
    batcher.close()


def test_a_full_queue_refuses_and_a_cancelled_item_is_not_worked_on(gate):
    batcher, _ = held_batcher(gate, max_queue=2)
    gone, kept = batcher.submit(1), batcher.submit(2)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        batcher.submit(3)
    assert gone.cancel()
    gate.opened.set()
    assert kept.result(30) == 20
    batcher.close()
    assert gate.batches == [[0], [2]]


def test_closing_answers_what_waits_and_refuses_more(gate):
    batcher, _ = held_batcher(gate)
    waiting = batcher.submit(5)
    gate.opened.set()
    batcher.close()
    assert waiting.result(0) == 50
    with pytest.raises(QueueFullError):
        batcher.submit(6)
