"""Options and output that the evaluation commands share."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from aroface.errors import ConfigError
from launch.console import new_table, show
from retrieval.metrics.rules import RULES

__all__ = [
    "RateList",
    "add_rule",
    "counts",
    "finite",
    "one_rate",
    "positive",
    "print_record",
    "rate",
    "rates",
    "refuse_options",
    "whole",
]


class RateList(tuple[str, ...]):
    """Rates as they were written; `values` are the numbers."""

    @property
    def values(self) -> list[float]:
        """The rates as floats."""
        return [float(text) for text in self]


def rates(text: str) -> RateList:
    """Parse `1e-4,1e-3`: comma-separated rates in (0, 1]."""
    labels = RateList(part.strip() for part in text.split(","))
    for label in labels:
        try:
            value = float(label)
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"{label!r} is not a rate; write numbers in (0, 1] such as 0.01 or 1e-4")
    return labels


def one_rate(text: str) -> RateList:
    """Parse `1e-2`: a single rate, where the protocol measures at one operating point."""
    labels = rates(text)
    if len(labels) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds {len(labels)} rates; here is one, such as {labels[0]}")
    return labels


def rate(text: str) -> float:
    """Parse one number in (0, 1]."""
    return one_rate(text).values[0]


def finite(text: str) -> float:
    """Parse a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number, such as 0.35")
    return value


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def counts(text: str) -> list[int]:
    """Parse `1,5,10`: comma-separated whole numbers of at least 1."""
    return [positive(part) for part in text.split(",")]


def refuse_options(args: argparse.Namespace, used_by: Mapping[str, Sequence[str]]) -> None:
    """Refuse options that the chosen --task does not use.

    Args:
        args: parsed, with `task`.
        used_by: option, as an attribute that is None or False unless it was given -> the tasks that use it.

    Raises:
        ConfigError: another task was chosen.
    """
    for name, tasks in used_by.items():
        if args.task not in tasks and getattr(args, name) not in (None, False):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect on --task {args.task}, it belongs to --task "
                f"{' and '.join(tasks)}; leave it out, or choose another task."
            )


def add_rule(parser: argparse.ArgumentParser, choices: Sequence[str] = RULES) -> None:
    """Declare --rule with these choices."""
    parser.add_argument(
        "--rule",
        choices=choices,
        default="canonical",
        help="how a rate becomes a threshold; the others only to compare with numbers made by them",
    )


def print_record(record: Mapping[str, Any], *, title: str) -> None:
    """The metrics of one record as a table on stdout."""
    from retrieval.results import support_mark

    numbers = ("value", "95 % interval", "K", "realised", "threshold")
    table = new_table("metric", *numbers, title=title, numbers=numbers)
    for name, entry in record["metrics"].items():
        if entry["value"] is None:
            table.add_row(name, "-", entry["reason"], "", "", "")
            continue
        interval = entry.get("ci95")
        table.add_row(
            name,
            f"{100 * entry['value']:.2f} %{support_mark(entry)}",
            f"{100 * interval[0]:.2f} - {100 * interval[1]:.2f}" if interval else "",
            _number(entry.get("k"), "d"),
            _number(entry.get("realised"), ".2e"),
            _number(entry.get("threshold"), ".4f"),
        )
    table.caption = (
        ", ".join(f"{name} {value}" for name, value in record["counts"].items()) + f"; rule {record['rule']}"
    )
    show(table, *(f"* {warning}" for warning in record["warnings"]))


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
