"""How well a training was fed: the share of its steps that waited for a batch, from the metrics of a run.

The first line of the metrics covers the warm-up and is left out.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

from aroface.engine.metrics import METRICS_FILE
from aroface.errors import DataError
from launch.bench.output import Report
from launch.outputs import output_file

_GOAL_PERCENT = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of `aroface train`")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    path = args.run / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist; name the run directory of a training.")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "img_per_s" in line]
    if len(lines) < 2:
        raise DataError(f"{path} has {len(lines)} line(s); the first is warm-up. Train longer or log more often.")
    steps, images = ([b[key] - a[key] for a, b in itertools.pairwise(lines)] for key in ("step", "samples"))
    step_s = [n / line["img_per_s"] / count for n, line, count in zip(images, lines[1:], steps, strict=True)]
    shares = [100 * line["data_wait_s"] / seconds for line, seconds in zip(lines[1:], step_s, strict=True)]
    report = Report("feeding", ("torch", "deepspeed"), {"run": str(args.run), "lines": len(shares)})
    report.add("images per second, median", statistics.median(line["img_per_s"] for line in lines[1:]), "img/s")
    report.add("waiting for a batch, median", statistics.median(shares), "% of a step", at_most=_GOAL_PERCENT)
    report.add("waiting for a batch, largest", max(shares), "% of a step")
    report.add("peak memory", max(line["memory_gib"] for line in lines), "GiB")
    report.write(args.out)
    return 0
