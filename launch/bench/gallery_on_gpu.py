"""Exact search on one GPU at the size of large galleries, against the bandwidth and the arithmetic of the device.

Unit vectors are drawn on the device, without structure: an exact search reads all of them whatever they are. They are
kept as float16 there and as float32 in the memory of the host, where `gallery, fp16` compares its candidates again, as
every gallery of that kind does. Beside it: its index alone, a bare Faiss index where Faiss supports GPUs, and a product
with `topk` in PyTorch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.bench.measure import interleave, synchronise
from launch.bench.output import Report
from launch.bench.roofline import Peaks, measure_peaks

if TYPE_CHECKING:
    import torch

    from retrieval.gallery.sources import IndexedSource, TrackedIndex

__all__ = ["measure_on"]

_DIM = 512
_DRAWN_ROWS = 1 << 18
_BLOCK_ROWS = 1 << 20  # of a score matrix in PyTorch
_FAISS_ROWS = 1 << 20  # that it takes at a time
_MANY = 4096
_ROUNDS = 10


def measure_on(
    device: "torch.device",
    report: Report,
    *,
    size: int,
    top: int,
    bare: Any = None,
    many: int = _MANY,
    peaks: Peaks | None = None,
) -> None:
    """Fill an index and search it by one probe and by many.

    Args:
        device: a GPU; the CPU serves to test this.
        report: gets the figures.
        size: vectors.
        top: length of the lists.
        bare: an empty Faiss index to compare with (default: float16 on the first GPU, where Faiss supports it).
        many: probes of the large search.
        peaks: of the device (default: measured).
    """
    from retrieval.gallery.on_gpu import flat_on
    from retrieval.gallery.segments import Entries, Rows
    from retrieval.gallery.sources import IndexedSource

    peaks = peaks or measure_peaks(device="cuda")
    rows, kept = _drawn(size, device)
    numbers = np.arange(size)
    tracked = flat_on([device], Rows([rows], _DIM), numbers, use_float16=True)
    names = numbers.astype("U8")
    source = IndexedSource(Rows([rows], _DIM), Entries(names, names, np.ones(size, np.float32), numbers), tracked, size)
    bare = _bare_index() if bare is None else bare
    if bare is None:
        print("skipped: bare Faiss, which has no support for GPUs here")
    for start in range(0, size if bare is not None else 0, _FAISS_ROWS):
        bare.add(rows[start : start + _FAISS_ROWS])
    probes, _ = _drawn(many, device, seed=1)
    for count in (1, many):
        limit = peaks.limit_s(2.0 * _DIM * size * count, 2.0 * _DIM * size, "fp16")
        works = _works(source, tracked, bare, kept, probes[:count], top)
        ways = {name: _waited_for(work, device, count) for name, work in works.items()}
        for found in interleave(ways, rounds=_ROUNDS):
            goal = 1.3 if count == 1 and found.name == "index alone, float16" else None
            report.add(f"{size:,} x {count:,}: {found.name}", 1e3 * found.wall_s, "ms", limit=1e3 * limit)
            report.add(f"{size:,} x {count:,}: {found.name} / limit", found.wall_s / limit, "x", at_most=goal)
    report.add("same best entry as a float32 product, 64 probes", _agreement(source, rows, probes[:64], top), "")


def _waited_for(work: Callable[[], object], device: "torch.device", count: int) -> Callable[[], int]:
    def timed() -> int:
        work()
        synchronise(device)
        return count

    return timed


def _works(
    source: "IndexedSource",
    tracked: "TrackedIndex",
    bare: Any,
    kept: "torch.Tensor",
    probes: NDArray[np.float32],
    top: int,
) -> dict[str, Callable[[], object]]:
    from retrieval.gallery.search import Request, search_source

    works: dict[str, Callable[[], object]] = {
        "index alone, float16": lambda: tracked.search(probes, top),
        "gallery, fp16: compared again in float32": lambda: search_source(source, probes, Request(top)),
        "product and topk in PyTorch": lambda: _by_pytorch(kept, probes, top),
    }
    if bare is not None:
        works["bare Faiss, float16"] = lambda: bare.search(probes, top)
    return works


def _by_pytorch(kept: "torch.Tensor", probes: NDArray[np.float32], top: int) -> NDArray[np.int64]:
    import torch

    given = torch.from_numpy(probes).to(kept.device, kept.dtype)
    best: list[Any] = []
    for start in range(0, len(kept), _BLOCK_ROWS):
        scores, places = (given @ kept[start : start + _BLOCK_ROWS].T).topk(min(top, len(kept) - start), dim=1)
        best.append((scores, places + start))
    scores, places = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    found: NDArray[np.int64] = places.gather(1, scores.topk(top, dim=1).indices).cpu().numpy()
    return found


def _drawn(size: int, device: "torch.device", seed: int = 0) -> "tuple[NDArray[np.float32], torch.Tensor]":
    """(size, D) unit vectors on the host, and in float16 on the device."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    rows = np.empty((size, _DIM), np.float32)
    kept = torch.empty((size, _DIM), dtype=torch.float16, device=device)
    for start in range(0, size, _DRAWN_ROWS):
        count = min(_DRAWN_ROWS, size - start)
        block = torch.nn.functional.normalize(torch.randn(count, _DIM, generator=generator, device=device))
        kept[start : start + count] = block
        rows[start : start + count] = block.cpu().numpy()
    synchronise(device)
    return rows, kept


def _bare_index() -> Any:
    """Float16 on the first GPU; None where Faiss has no support for GPUs."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        return None
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    return faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), _DIM, config)


def _agreement(source: "IndexedSource", rows: NDArray[np.float32], probes: NDArray[np.float32], top: int) -> float:
    """Share of probes whose best entry is that of a float32 product over everything, on the host."""
    from retrieval.gallery.search import Request, search_source

    found = [int(near[0].entry_id) for near in search_source(source, probes, Request(top))]
    best, score = np.zeros(len(probes), np.int64), np.full(len(probes), -np.inf, np.float32)
    for start in range(0, len(rows), _DRAWN_ROWS):
        scores = probes @ rows[start : start + _DRAWN_ROWS].T
        places = scores.argmax(axis=1)
        highest = scores[np.arange(len(probes)), places]
        best = np.where(highest > score, places + start, best)
        score = np.maximum(score, highest)
    return float(np.mean(np.array(found) == best))
