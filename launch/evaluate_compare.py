"""Is system A better than B: paired comparison of two evaluations of the same protocol.

A and B are files of `--details`. Searches: Rank-1 and Rank-5, with McNemar's exact test and a bootstrap over subjects.
Pairs: TAR at FAR, each system with its own threshold, and a bootstrap that draws the same people for both.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import ConfigError, DataError
from launch.console import new_table, show
from launch.evaluate_options import positive, rates
from launch.outputs import output_file

if TYPE_CHECKING:
    from retrieval.metrics.comparison import Comparison

_FARS = "1e-4,1e-3,1e-2"
_RANKS = (1, 5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("first", type=Path, metavar="A.npz", help="details of system A")
    parser.add_argument("second", type=Path, metavar="B.npz", help="details of system B")
    parser.add_argument("--far", type=rates, metavar="RATE,..", help=f"FARs of pairs (default: {_FARS})")
    parser.add_argument("--resamples", type=positive, default=1000, metavar="N", help="resamples of the bootstrap")
    parser.add_argument("--out", type=output_file, required=True, metavar="R.json", help="result file")


def run(args: argparse.Namespace) -> int:
    """Compare, write, print."""
    from retrieval.details import read_details
    from retrieval.results import file_hashes, metric, result_record, write_result

    first, second = read_details(args.first), read_details(args.second)
    _check_same(args, first, second)
    if args.far is not None and "scores" not in first:
        raise ConfigError(
            f"--far {','.join(args.far)} belongs to pairs (1:1), and {args.first} holds searches (1:N), whose ranks "
            "are compared; leave it out."
        )
    found = _pairs(args, first, second) if "scores" in first else _searches(args, first, second)
    metrics = {
        name: metric(c.difference, interval=c.interval, first=c.first, second=c.second, p_value=c.p_value, unit="A - B")
        for name, c in found.items()
    }
    counts = {"trials": len(first["subjects"])}
    files = {"a": file_hashes([args.first]), "b": file_hashes([args.second])}
    # Thresholds of pairs are set here, by the canonical rule; ranks were formed by the rule of the evaluation.
    rule = "canonical" if "scores" in first else str(first["rule"])
    prepared = {name: json.loads(str(own["preprocessing"])) for name, own in (("a", first), ("b", second))}
    record = result_record("compare", rule, counts=counts, metrics=metrics, inputs=files, preprocessing=prepared)
    write_result(args.out, record | {"of": str(first["protocol"])})
    _print(str(first["protocol"]), found)
    return 0


def _check_same(args: argparse.Namespace, first: dict[str, Any], second: dict[str, Any]) -> None:
    import numpy as np

    trials = [name for name in ("protocol", "subjects", "same", "is_mated", "gallery") if name in first]
    for name in [*trials, *(["rule"] if "rank" in first else [])]:
        if name not in second or not np.array_equal(first[name], second[name]):
            raise DataError(
                f"{args.first} and {args.second} differ in {name}: they are not two evaluations of the same "
                "protocol, by the same rule, with the same trials in the same order."
            )


def _pairs(args: argparse.Namespace, first: dict[str, Any], second: dict[str, Any]) -> "dict[str, Comparison]":
    from retrieval.metrics.comparison import compare_tar

    same = first["same"]
    if same.all() or not same.any():
        kind = "impostor" if same.all() else "genuine"
        raise DataError(f"{args.first} holds no {kind} pair; there is no TAR at FAR to compare.")
    sides = first["subjects"][:, 0], first["subjects"][:, 1]
    fars = args.far or rates(_FARS)
    found = compare_tar((first["scores"], second["scores"]), same, sides, fars.values, resamples=args.resamples)
    return {f"tar@far={label}": comparison for label, comparison in zip(fars, found, strict=True)}


def _searches(args: argparse.Namespace, first: dict[str, Any], second: dict[str, Any]) -> "dict[str, Comparison]":
    from retrieval.metrics.comparison import compare_hits

    mated = first["is_mated"]
    if not mated.any():
        raise DataError(f"{args.first} holds no mated search; there is no rank to compare.")
    return {
        f"rank_{k}": compare_hits(
            first["rank"][mated] <= k, second["rank"][mated] <= k, first["subjects"][mated], resamples=args.resamples
        )
        for k in _RANKS
    }


def _print(protocol: str, found: "dict[str, Comparison]") -> None:
    numbers = ("A", "B", "A - B", "95 % interval", "McNemar p")
    table = new_table("metric", *numbers, title=f"A - B on {protocol}", numbers=numbers)
    for name, c in found.items():
        interval = f"{100 * c.interval.low:+.2f} to {100 * c.interval.high:+.2f}" if c.interval else ""
        p_value = "" if c.p_value is None else f"{c.p_value:.2g}"
        values = f"{100 * c.first:.2f} %", f"{100 * c.second:.2f} %", f"{100 * c.difference:+.2f}"
        table.add_row(name, *values, interval, p_value)
    show(table)
