"""Scores formed on devices give what NumPy's give, to the last bit; PyTorch's CPU tensors stand in for GPUs."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from aroface.errors import ConfigError
from retrieval.candidates import candidate_rows
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import IdentificationResult, device_blocks, evaluate_identification, score_blocks
from retrieval.metrics.device_blocks import blocks_on, search_devices
from retrieval.metrics.score_blocks import Pairs, Sides, exact_blocks, numpy_blocks

CPU = torch.device("cpu")
DIM = 48


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and groups, and rows of them that fill a group alone."""
    monkeypatch.setattr(score_blocks, "_BLOCK_ELEMENTS", 3000)
    monkeypatch.setattr(score_blocks, "_GROUP_PAIRS", 900)
    monkeypatch.setattr(score_blocks, "_ALONE_PAIRS", 37)
    monkeypatch.setattr(device_blocks, "_BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr(device_blocks, "_UPLOAD_ROWS", 50)


def drawn(count: int, people: int, seed: int) -> EmbeddingSet:
    """Faces of some people, with copies, zero vectors and failures; half of them all but orthogonal to the others."""
    generator = np.random.default_rng(seed)
    subjects = generator.integers(0, people, count)
    values = np.random.default_rng(1).normal(size=(100, DIM))[subjects] + generator.normal(size=(count, DIM))
    far = generator.random(count) < 0.5
    values[far, : DIM // 2] *= 1e-9
    values[~far, DIM // 2 :] *= 1e-9
    values[count // 4 : count // 4 + 20] = values[:20]
    values[6] = 0
    names = np.array([f"{seed}-{row}" for row in range(count)])
    return EmbeddingSet(values.astype(np.float32), subjects, keys=names, fte=generator.random(count) < 0.05)


GALLERY, PROBES = drawn(120, 30, 2), drawn(60, 40, 3)


def everything(result: IdentificationResult) -> list[Any]:
    searches = [
        [None if (values := getattr(search, name)) is None else values.tolist() for name in search.__dataclass_fields__]
        for search in result.searches
    ]
    return [repr(searches), result.ranks, result.num_tied, result.open_set, result.mean_average_precision]


@dataclass(frozen=True)
class NoisyBlock:
    """Scores that were summed in another order: each is off by what the bound allows."""

    block: Any
    noise: Any

    def at(self, rows: Any, columns: Any) -> Any:
        return self.block.at(rows, columns) + self.noise[rows, columns]

    def highest(self, rows: Any, count: int) -> Any:
        noisy = -np.sort(-(self.block.scores + self.noise)[rows], axis=1)
        return noisy[:, min(count, noisy.shape[1]) - 1]

    def count(self, rows: Any, lows: Any) -> Any:
        return ((self.block.scores + self.noise)[rows] >= lows[:, None]).sum(axis=1)

    def within(self, rows: Any, lows: Any, highs: Any) -> Iterator[Pairs]:
        noisy = (self.block.scores + self.noise)[rows]
        places, columns = np.nonzero((noisy >= lows[:, None]) & (noisy < highs[:, None]))
        yield rows[places], columns, noisy[places, columns]


def noisy_blocks(sides: Sides) -> Iterator[Any]:
    generator = np.random.default_rng(4)
    for part, block in numpy_blocks(sides):
        noise = generator.choice([-0.25, 0.25], block.scores.shape) * sides.tolerance
        scores = block.scores.astype(np.float32)
        assert ((block.scores + noise).astype(np.float32) != scores)[np.isfinite(scores)].mean() > 0.1  # it would show
        yield part, NoisyBlock(block, noise)


WAYS = {
    "one device": blocks_on([CPU]),
    "three devices": blocks_on([CPU] * 3),
    "more devices than entries": blocks_on([CPU] * 130),
    "another order of sums": noisy_blocks,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["canonical", "argsort_rev", "ijb_1n"])
def test_every_way_finds_the_same(way: str, rule: Any) -> None:
    halves = [GALLERY.take(np.arange(60)), GALLERY.take(np.arange(60, 120))]
    for level, galleries in itertools.product(("entry", "identity"), ([GALLERY], halves)):
        options: dict[str, Any] = {"rank_level": level, "rule": rule, "with_average_precision": True}
        options |= {"fpirs": (0.01, 0.1, 1.0), "candidates": 5}
        expected = evaluate_identification(galleries, PROBES, **options)
        found = evaluate_identification(galleries, PROBES, **options, blocks=WAYS[way])
        assert everything(found) == everything(expected)
        assert expected.num_tied or rule == "argsort_rev"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 4, 1000])
def test_candidate_lists_are_the_same(way: str, count: int) -> None:
    expected = list(candidate_rows(GALLERY, PROBES, count=count))
    assert list(candidate_rows(GALLERY, PROBES, count=count, blocks=WAYS[way])) == expected
    lists = {probe: [row for row in expected if row[0] == probe] for probe, *_ in expected}
    assert len(lists) == PROBES.enrolled.sum()
    rows = {str(name): row for row, name in enumerate(GALLERY.keys.tolist())}  # type: ignore[union-attr]
    for found in lists.values():
        assert [rank for _, rank, *_ in found] == list(range(1, min(count, int(GALLERY.enrolled.sum())) + 1))
        assert (order := [(-score, rows[entry]) for _, _, entry, score, _ in found]) == sorted(order)


@pytest.mark.parametrize("way", [None, *WAYS])
def test_scores_are_those_of_each_pair_alone(way: str | None) -> None:
    """And of pairs summed in extended precision, but for the last bit where that is in the middle."""
    sides = Sides(GALLERY, PROBES, np.random.default_rng(0).permutation(120))
    lengths = [np.linalg.norm(s.embeddings.astype(np.longdouble), axis=1, keepdims=True) for s in (PROBES, GALLERY)]
    with np.errstate(invalid="ignore"):
        probes, gallery = PROBES.embeddings / lengths[0], GALLERY.embeddings / lengths[1]
    seen = 0
    for part, block in exact_blocks(sides, WAYS[way] if way else None):
        everywhere = np.full(part.stop - part.start, -np.inf, np.float32)
        for rows, columns, scores in block.at_least(np.arange(len(everywhere)), everywhere):
            own, entries = part.start + rows, sides.order[columns]
            assert (scores == sides.alone(own, columns)).all()
            exact = (probes[own] * gallery[entries]).sum(axis=1)
            assert (np.abs(scores - exact) <= 0.5001 * np.spacing(np.abs(scores)) + 1e-15).all()
            assert (block.at(rows, columns) == scores).all()
            seen += len(scores)
    assert seen == PROBES.enrolled.sum() * GALLERY.enrolled.sum()


def test_names_of_devices() -> None:
    assert search_devices("cpu") == []
    for name in ("gpu", "cuda:x", "cuda:0;1"):
        with pytest.raises(ConfigError, match="write cpu, cuda"):
            search_devices(name)
    with pytest.raises(ConfigError, match="PyTorch sees .* or choose cpu"):
        search_devices("cuda:99")


def test_devices_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert search_devices("cuda") == [torch.device("cuda", number) for number in range(3)]
    assert search_devices("cuda:2,0") == [torch.device("cuda", 2), torch.device("cuda", 0)]
    with pytest.raises(ConfigError, match="PyTorch sees 3 GPU"):
        search_devices("cuda:0,3")


def test_other_scores_stay_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="choose --device cpu"):
        evaluate_identification([GALLERY], PROBES, similarity="mls", blocks=blocks_on([CPU]))


def test_a_gallery_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ConfigError, match=r"on each of 2 GPU\(s\).*choose cpu"):
        evaluate_identification([GALLERY], PROBES, blocks=blocks_on([CPU] * 2))
