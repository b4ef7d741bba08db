"""The searches of the protocols on GPUs beside the CPU of the same machine, on drawn embeddings.

IJB-C 1:N and TinyFace at their size, and a collection of its own of 200,000 entries and 10,000 probes, half of them
strangers. Both sides take turns; the result has to be the same to the last bit. The CPU uses all its cores.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.bench.measure import interleave
from launch.bench.output import Report
from launch.bench.protocols import Search, ijbc_search, tinyface

if TYPE_CHECKING:
    import torch

    from retrieval.metrics import IdentificationResult

__all__ = ["measure_on"]

_COLLECTION = (200_000, 10_000)  #: entries, probes
_DIM = 512
_ROUNDS = 3


def measure_on(devices: "Sequence[torch.device]", report: Report, *, scale: float, rounds: int = _ROUNDS) -> None:
    """Search by `evaluate_identification`, on the devices and on the CPU.

    Args:
        devices: GPUs; the CPU serves to test this.
        report: gets the figures.
        scale: of every size.
        rounds: that count.
    """
    made: Mapping[str, Callable[[float], Search]] = {
        "IJB-C 1:N, two galleries": ijbc_search,
        "TinyFace with distractors and mAP": tinyface,
        "own collection": _collection,
    }
    for name, make in made.items():
        _measure(devices, report, name, make(scale), rounds)


def _measure(devices: "Sequence[torch.device]", report: Report, name: str, search: Search, rounds: int) -> None:
    from retrieval.metrics import evaluate_identification
    from retrieval.metrics.device_blocks import blocks_on

    galleries, probes, options = search
    found: dict[str, IdentificationResult] = {}

    def work(way: str) -> Callable[[], int]:
        blocks = blocks_on(devices) if way == "device" else None

        def run() -> int:
            found[way] = evaluate_identification(galleries, probes, **options, blocks=blocks)
            return len(probes)

        return run

    size = f"{name}, {len(probes):,} x {sum(map(len, galleries)):,}"
    times = {m.name: m.wall_s for m in interleave({way: work(way) for way in ("CPU", "device")}, rounds=rounds)}
    for way, seconds in times.items():
        report.add(f"{size}: {way}", seconds, "s")
    report.add(f"{size}: times as fast", times["CPU"] / times["device"], "x")
    report.add(f"{size}: same result", _is_same(found["CPU"], found["device"]), "", at_least=1)


def _is_same(one: "IdentificationResult", other: "IdentificationResult") -> bool:
    """To the last bit, NaN being NaN."""

    def content(result: "IdentificationResult") -> list[Any]:
        arrays = [getattr(search, name) for search in result.searches for name in search.__dataclass_fields__]
        return [*(None if a is None else a.tobytes() for a in arrays), result.ranks, result.open_set]

    return content(one) == content(other)


def _collection(scale: float) -> Search:
    from retrieval.embeddings import EmbeddingSet

    generator = np.random.default_rng(1)
    entries, probes = (max(8, int(size * scale)) for size in _COLLECTION)
    gallery = generator.standard_normal((entries, _DIM), np.float32)
    searches = generator.standard_normal((probes, _DIM), np.float32)
    mated = np.arange(probes // 2)
    searches[mated] += 0.2 * gallery[mated]
    subjects = np.arange(entries + probes)
    options = {"fpirs": (0.001, 0.01, 0.1)}
    strangers = np.concatenate([mated, subjects[entries : entries + probes - len(mated)]])
    return [EmbeddingSet(gallery, subjects[:entries])], EmbeddingSet(searches, strangers), options
