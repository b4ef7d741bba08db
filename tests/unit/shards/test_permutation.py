import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.permutation import permute


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(images), np.arange(size))


@given(size=st.integers(10**6, 2**40))
@settings(max_examples=30, deadline=None)
def test_has_no_collisions_in_large_sets(size: int) -> None:
    positions = np.unique(np.random.default_rng(size).integers(0, size, 20_000))
    images = permute(positions, size=size, seed=1, epoch=2)
    assert len(np.unique(images)) == len(positions)
    assert images.min() >= 0
    assert images.max() < size


def test_a_position_does_not_depend_on_its_neighbours() -> None:
    whole = permute(np.arange(1000), size=1000, seed=3, epoch=4)
    assert all(permute(np.array([p]), size=1000, seed=3, epoch=4)[0] == whole[p] for p in range(0, 1000, 37))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (1, 1)])
def test_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    one = permute(np.arange(10_000), size=10_000, seed=0, epoch=0)
    other = permute(np.arange(10_000), size=10_000, seed=seed, epoch=epoch)
    assert np.mean(one == other) < 0.002
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_neighbours_are_uncorrelated_and_evenly_spread() -> None:
    size = 100_000
    images = permute(np.arange(size), size=size, seed=7, epoch=0)
    for lag in (1, 2, 64, 128):
        assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < 0.02
    counts = np.histogram(images[:10_000], bins=100, range=(0, size))[0]
    assert np.sum((counts - 100) ** 2 / 100) < 160  # chi-square, 99 degrees of freedom: 1e-4 lies at 158
