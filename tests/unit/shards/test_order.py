"""Orders are pure functions of (seed, position); each keeps what it promises, whatever is asked for at once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aroface.errors import DataError
from shards.order import Balanced, Blocks, Order, Random, Weighted, read_weights
from shards.permutation import key_of, mix, permute_each

LABELS = np.repeat(np.arange(7), [1, 2, 3, 5, 8, 13, 1])


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, int]:
    size = draw(st.integers(1, 300))
    if draw(st.booleans()):
        return Random(size), size
    return Blocks(size, block=draw(st.integers(1, 50)), window=draw(st.integers(1, 6))), size


@given(orders(), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_every_sample_comes_once_per_epoch(made: tuple[Order, int], seed: int) -> None:
    order, size = made
    stream = order.samples_at(np.arange(3 * size), seed=seed)
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
    if size > 20:
        assert (stream[:size] != stream[size : 2 * size]).any()


@given(orders(), st.integers(0, 2**31), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_position_is_answered_alike_in_any_company(made: tuple[Order, int], seed: int, random: object) -> None:
    order, size = made
    positions = np.array([random.randrange(5 * size) for _ in range(20)])
    together = order.samples_at(positions, seed=seed)
    alone = [int(order.samples_at(np.array([p]), seed=seed)[0]) for p in positions.tolist()]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [1000, 1001, 1024, 4095])
def test_a_window_reads_only_its_blocks(size: int) -> None:
    block, window = 64, 4
    order = Blocks(size, block=block, window=window)
    seen: dict[int, set[int]] = {}
    told: dict[int, set[int]] = {}
    for position in range(2 * size):
        number, ranges = order.ranges_near(position, seed=3)
        told[number] = {sample for start, stop in ranges for sample in range(start, stop)}
        seen.setdefault(number, set()).add(int(order.samples_at(np.array([position]), seed=3)[0]))
    assert seen == told
    assert max(map(len, told.values())) <= block * window
    assert list(told) == sorted(told), "windows are numbered in the order in which they come"


def test_the_samples_without_a_whole_block_change_with_the_epoch() -> None:
    order = Blocks(105, block=10, window=2)
    last = [set(order.samples_at(np.arange(105 * e + 100, 105 * e + 105), seed=1).tolist()) for e in range(4)]
    assert len(set(map(frozenset, last))) > 1


def test_neighbours_are_shuffled_within_a_window() -> None:
    stream = Blocks(4000, block=100, window=5).samples_at(np.arange(4000), seed=0)
    assert (np.abs(np.diff(stream)) == 1).mean() < 0.02


@given(st.integers(0, 2**31), st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_balanced_shows_every_identity_once_per_round_and_its_images_in_turn(seed: int, first: int) -> None:
    order = Balanced(LABELS, 7)
    stream = order.samples_at(np.arange(first * 7, (first + 130) * 7), seed=seed)
    by_round = LABELS[stream].reshape(-1, 7)
    assert all(sorted(row) == list(range(7)) for row in by_round.tolist())
    whole = order.samples_at(np.arange(7 * 26), seed=seed)
    for identity in range(7):
        images = whole[LABELS[whole] == identity]
        count = int((identity == LABELS).sum())
        for start in range(0, len(images) - count + 1, count):
            assert len(set(images[start : start + count].tolist())) == count


def test_weights_are_met_in_expectation() -> None:
    weights = np.array([0, 1, 1, 2, 4, 8, 0.0])
    labels = LABELS[Weighted(LABELS, weights).samples_at(np.arange(160_000), seed=5)]
    share = np.bincount(labels, minlength=7) / 160_000
    # binomial: five standard deviations of a share of one half are 0.006
    np.testing.assert_allclose(share, weights / 16, atol=0.006)
    within = np.bincount(Weighted(LABELS, np.eye(7)[5]).samples_at(np.arange(130_000), seed=5), minlength=33)[19:32]
    assert (np.abs(within / 10_000 - 1) < 0.05).all()


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="All weights of data.order are 0"):
        Weighted(LABELS, np.zeros(7))


def test_a_class_without_images_cannot_be_balanced() -> None:
    with pytest.raises(DataError, match="Class 7 has no image"):
        Balanced(LABELS, 8)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_each_of_many_small_permutations_is_one(sizes: list[int], seed: int) -> None:
    positions = np.concatenate([np.arange(size) for size in sizes])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    keys = mix(owner.astype(np.uint64) ^ key_of(seed))
    found = permute_each(positions, np.asarray(sizes)[owner], keys)
    for number, size in enumerate(sizes):
        assert sorted(found[owner == number]) == list(range(size))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zoe,1\n", "line 1: the shards have no identity 'zoe'"),
        ("identity,weight\nada,-1\n", "line 2: the weight '-1' is no finite number"),
        ("ada,inf\n", "the weight 'inf'"),
        ("ada\n", "line 1: expected identity,weight"),
    ],
)
def test_unusable_weights_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "w.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_weights(tmp_path / "w.csv", ["ada", "bob"])
    with pytest.raises(DataError, match="cannot be read"):
        read_weights(tmp_path / "absent.csv", ["ada"])


def test_weights_of_unnamed_identities_are_one(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("identity,weight\nbob,0.5\n")
    assert read_weights(tmp_path / "w.csv", ["ada", "bob"]).tolist() == [1, 0.5]
