"""Is A better than B: the paired comparisons against plain loops over people, pairs and scores, ties included."""

import math

import numpy as np
import pytest

from retrieval.metrics.comparison import compare_tar
from retrieval.metrics.intervals import resampled_weights

FARS = (0.02, 0.1, 0.3)
PEOPLE, RESAMPLES = 14, 80


def trials(seed, steps=12):
    """Pairs of 14 people, their sides, and scores of two systems on a grid of few steps, so that many are equal."""
    generator = np.random.default_rng(seed)
    first, second = generator.integers(0, PEOPLE, (2, 300))
    second[:80] = first[:80]
    same = first == second
    systems = []
    for gain in (0.35, 0.15):
        scores = np.round((generator.random(300) + gain * same) * steps) / steps
        scores[generator.random(300) < 0.03] = -np.inf  # a side that failed to enrol
        systems.append(scores.astype(np.float32))
    return tuple(systems), same, (first, second)


def tar_of(scores, same, sides, copies, far):
    """Every pair counted as often as its people were drawn; nobody passes who is as good as the impostor that must not.

    None where no genuine or no impostor pair was drawn.
    """
    genuine, impostors = [], []
    for score, is_same, one, other in zip(scores.tolist(), same.tolist(), *(s.tolist() for s in sides), strict=True):
        if is_same:
            genuine += [score] * copies[one]
        else:
            impostors += [score] * (copies[one] * copies[other])
    if not genuine or not impostors:
        return None
    impostors.sort(reverse=True)
    allowed = math.floor(far * len(impostors) + 1e-9)
    limit = impostors[allowed] if allowed < len(impostors) else -math.inf
    return sum(score > limit for score in genuine) / len(genuine)


@pytest.mark.parametrize("seed", range(4))
def test_compared_rates_are_those_of_plain_loops_with_the_same_people_for_both(seed):
    systems, same, sides = trials(seed)
    found = compare_tar(systems, same, sides, FARS, resamples=RESAMPLES)
    draws = resampled_weights(PEOPLE, RESAMPLES).astype(int).tolist()
    for far, comparison in zip(FARS, found, strict=True):
        once = [tar_of(scores, same, sides, [1] * PEOPLE, far) for scores in systems]
        assert (comparison.first, comparison.second) == pytest.approx(tuple(once))
        assert comparison.difference == pytest.approx(once[0] - once[1])
        drawn = [[tar_of(scores, same, sides, copies, far) for scores in systems] for copies in draws]
        differences = sorted(one - other for one, other in drawn if one is not None and other is not None)
        for bound, share in ((comparison.interval.low, 0.025), (comparison.interval.high, 0.975)):
            place = share * (len(differences) - 1)  # linear between the neighbours
            below, above = differences[math.floor(place)], differences[math.ceil(place)]
            assert bound == pytest.approx(below + (place % 1) * (above - below), abs=1e-6)
        assert comparison.interval.low < comparison.interval.high
        assert comparison.p_value is None


def test_ties_at_the_threshold_are_rejected_in_both_systems():
    """At FAR 1/4 one of four impostors may pass: three of A's share place 2 with half of the genuine ones."""
    same = np.array([True] * 4 + [False] * 4)
    sides = np.arange(8), np.array([0, 1, 2, 3, 5, 6, 7, 4])
    tied = np.array([0.5, 0.5, 0.6, 0.6, 0.9, 0.5, 0.5, 0.5], np.float32)
    apart = np.array([0.5, 0.5, 0.6, 0.6, 0.9, 0.4, 0.3, 0.2], np.float32)
    (comparison,) = compare_tar((tied, apart), same, sides, [0.25], resamples=20)
    assert (comparison.first, comparison.second) == (0.5, 1.0)


def test_a_system_against_itself_differs_by_nothing_and_swapping_turns_the_sign():
    (one, other), same, sides = trials(5)
    for comparison in compare_tar((one, one.copy()), same, sides, FARS, resamples=RESAMPLES):
        assert (comparison.difference, comparison.interval.low, comparison.interval.high) == (0, 0, 0)
    there = compare_tar((one, other), same, sides, FARS, resamples=RESAMPLES)
    back = compare_tar((other, one), same, sides, FARS, resamples=RESAMPLES)
    for forth, turned in zip(there, back, strict=True):
        assert forth.difference == -turned.difference
        assert (forth.interval.low, forth.interval.high) == pytest.approx((-turned.interval.high, -turned.interval.low))
