"""The classifier on one GPU: time of a pass and memory at the classes of real sets, beside arcface_torch's arithmetic.

Wall time with the device waited for; variants in turns. Memory is what a pass adds to the centres and embeddings at its
worst moment. A variant that does not fit is left out, with the line that says so.
"""

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.bench.head import DIM, FUSED, OURS, Pass
from launch.bench.measure import interleave, synchronise
from launch.bench.output import Report, measured
from launch.bench.roofline import measure_peaks

if TYPE_CHECKING:
    import torch

__all__ = ["measure_on"]

_VARIANTS = ("arcface_torch", "plain", *(name for name in OURS if "sampled" not in name))
#: Floating-point operations for each batch x classes x dimension: logits, and both gradients; twice the logits where
#: they are not kept.
_FLOPS_KEPT, _FLOPS_TWICE = 6, 8


def measure_on(device: "torch.device", report: Report, *, batch: int, classes: int, rounds: int, bf16: bool) -> None:
    """Time and memory of every variant that fits.

    Args:
        device: a GPU; the CPU serves to test this.
        report: gets the figures.
        batch: images.
        classes: class centres.
        rounds: counted.
        bf16: also the share of the peak of bf16 products that our bf16 head reaches.
    """
    names = (*_VARIANTS, *FUSED) if device.type == "cuda" else _VARIANTS
    passes = {name: one for name in names if (one := _fitting(name, batch, classes, device)) is not None}
    memory = {name: _memory(one, device) for name, one in passes.items()}
    found = {m.name: m for m in interleave({n: _work(p, device) for n, p in passes.items()}, rounds=rounds)}
    title = f"{batch:,} x {classes:,}"
    report.details[title] = {name: measured(measurement) for name, measurement in found.items()}
    for name, measurement in found.items():
        report.add(f"{title}: {name}, pass", 1e3 * measurement.wall_s, "ms")
        if memory[name] is not None:
            report.add(f"{title}: {name}, memory of a pass", memory[name] or 0.0, "GiB")
        if name != "arcface_torch" and "arcface_torch" in found:
            pairs = zip(found["arcface_torch"].rounds, measurement.rounds, strict=True)
            speed = statistics.median(peer[0] / max(own[0], 1e-9) for peer, own in pairs)
            goal = {"fp32": 1.5, "bf16": 2.5}.get(name.split()[-1])
            report.add(f"{title}: {name}, speed of arcface_torch", speed, "x", at_least=goal)
    if bf16 and "chunked bf16" in found:
        rate = measure_peaks(device="cuda").flops_per_s["bf16"]
        for what, flops in (("logits kept", _FLOPS_KEPT), ("logits formed twice", _FLOPS_TWICE)):
            limit = flops * batch * classes * DIM / rate
            report.add(f"{title}: limit of bf16 products, {what}", 1e3 * limit, "ms")
            for name in ("chunked bf16", "fused bf16"):
                if name in found:
                    report.add(f"{title}: {name} / that limit", found[name].wall_s / limit, "x")


def _fitting(name: str, batch: int, classes: int, device: "torch.device") -> Pass | None:
    import torch

    try:
        one = Pass(name, batch, classes, device=device)
        one()
        one.forget()
    except torch.OutOfMemoryError:
        print(f"skipped: {name} at {batch:,} x {classes:,} does not fit into the memory of this GPU", flush=True)
        one = None
        torch.cuda.empty_cache()
    return one


def _memory(one: Pass, device: "torch.device") -> float | None:
    """GiB that a pass adds at its worst moment; None on the CPU."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one()
    one.forget()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30


def _work(one: Pass, device: "torch.device") -> Callable[[], int]:
    def work() -> int:
        one()
        one.forget()
        synchronise(device)
        return len(one.labels)

    return work
