"""The plain training step in the usual precision and memory layout, fp32 and contiguous, against others, in turns.

Those in bf16 are left out where the device has no units for it.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from aroface.bf16 import has_bf16_units
from aroface.devices import own_device
from launch.bench.measure import interleave
from launch.bench.output import Report, measured
from launch.bench.step import StepBench

__all__ = ["compare_layouts"]

_USUAL = "fp32, contiguous"
_VARIANTS: dict[str, dict[str, Any]] = {
    _USUAL: {"precision": "fp32", "contiguous": True, "compile": False},
    "fp32, channels last": {"precision": "fp32", "contiguous": False, "compile": False},
    "bf16, channels last": {"precision": "bf16", "contiguous": False, "compile": False},
    "bf16, channels last, compiled": {"precision": "bf16", "contiguous": False, "compile": True},
}
#: Ratio that bf16 is held against: of a network at full width, and of a thinner one.
_GOAL, _GOAL_THIN = 2.2, 2.0


def compare_layouts(args: argparse.Namespace) -> int:
    """Measure and print; every variant has a network of its own, with the same weights."""
    has_units = has_bf16_units(torch.device(own_device()).type)
    names = [
        name
        for name, variant in _VARIANTS.items()
        if (args.compile or not variant["compile"]) and (has_units or variant["precision"] == "fp32")
    ]
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
        goal = (_GOAL if args.width >= 1 else _GOAL_THIN) if _VARIANTS[name]["precision"] == "bf16" else None
        report.add(f"{name}, speed of {_USUAL}", ratio, "x", at_least=goal)
    report.write(args.out)
    return 0
