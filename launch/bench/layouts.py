"""The plain training step in the usual precision and memory layout, fp32 and contiguous, against ours, in turns."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from launch.bench.measure import interleave
from launch.bench.output import Report, measured
from launch.bench.step import StepBench

__all__ = ["compare_layouts"]

_USUAL, _OURS, _COMPILED = "fp32, contiguous", "bf16, channels last", "bf16, channels last, compiled"
_VARIANTS: dict[str, dict[str, Any]] = {
    _USUAL: {"precision": "fp32", "contiguous": True, "compile": False},
    _OURS: {"precision": "bf16", "contiguous": False, "compile": False},
    _COMPILED: {"precision": "bf16", "contiguous": False, "compile": True},
}
#: Ratio that is held against: of a network at full width, and of a thinner one.
_GOAL, _GOAL_THIN = 2.2, 2.0


def compare_layouts(args: argparse.Namespace) -> int:
    """Measure and print; every variant has a network of its own, with the same weights."""
    names = [name for name in _VARIANTS if args.compile or name != _COMPILED]
    benches = {
        name: StepBench(argparse.Namespace(**(vars(args) | _VARIANTS[name])), ["plain"]) for name in names
    }  # fmt: skip
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    device = benches[_USUAL].device
    report = Report("step layouts", ("torch", "deepspeed"), settings | {"device": benches[_USUAL].device_name})
    found = {m.name: m for m in interleave({n: b.ways["plain"] for n, b in benches.items()}, rounds=args.rounds)}
    report.details["steps"] = {name: measured(measurement) for name, measurement in found.items()}
    column = 1 if device.type == "cpu" else 0
    unit = "CPU-ms per image" if column else "ms per image"
    for name, measurement in found.items():
        report.add(
            f"{name}, step", 1000 * statistics.median(r[column] for r in measurement.rounds) / measurement.items, unit
        )
    for name in names[1:]:
        pairs = zip(found[_USUAL].rounds, found[name].rounds, strict=True)
        ratio = statistics.median(usual[column] / max(ours[column], 1e-9) for usual, ours in pairs)
        report.add(f"{name}, speed of {_USUAL}", ratio, "x", at_least=_GOAL if args.width >= 1 else _GOAL_THIN)
    report.write(args.out)
    return 0
