"""What every benchmark prints and writes: the machine, the command, the figures, and how far each is from its limit.

A limit says what the machine allows (`launch/bench/roofline.py`, or the bare thing that the project's own part can
never pass); a goal says what the project wants.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aroface.files import write_json
from launch.bench.measure import Measurement, machine

__all__ = ["Figure", "Report", "measured"]


@dataclass(frozen=True)
class Figure:
    """One number and, where there are any, the goal and the limit that it is held against."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    is_upper_limit: bool = False  #: the value must not be above the goal; otherwise not below
    limit: float | None = None  #: the best value that the machine allows, in the same unit
    higher_is_better: bool = False  #: a rate, which the limit bounds from above; otherwise a time

    @property
    def reached(self) -> bool | None:
        """None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.is_upper_limit else self.value >= self.goal

    @property
    def of_limit(self) -> float | None:
        """Share of the limit that is reached, 1 being all of it; None without a limit."""
        if self.limit is None:
            return None
        reached, allowed = (self.value, self.limit) if self.higher_is_better else (self.limit, self.value)
        return reached / allowed if allowed > 0 else None


@dataclass
class Report:
    """Collects the figures of one benchmark."""

    name: str
    packages: Sequence[str]  #: whose versions are noted
    settings: Mapping[str, Any]
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  #: for the JSON only

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        limit: float | None = None,
        higher_is_better: bool = False,
    ) -> None:
        """Note one figure and print it.

        Args:
            name: unique in the report.
            value: measured.
            unit: of value, goal and limit.
            at_least: goal.
            at_most: goal of the other kind.
            limit: the best value that the machine allows.
            higher_is_better: the figure is a rate; only asked where there is a limit.
        """
        goal = at_least if at_most is None else at_most
        figure = Figure(name, float(value), unit, goal, at_most is not None, limit, higher_is_better)
        self.figures.append(figure)
        print(_line(figure), flush=True)

    def write(self, path: Path | None) -> None:
        """Write everything as JSON, if a path is given."""
        if path is None:
            return
        figures = [
            {
                "name": f.name,
                "value": f.value,
                "unit": f.unit,
                "goal": f.goal,
                "reached": f.reached,
                "limit": f.limit,
                "of_limit": f.of_limit,
            }
            for f in self.figures
        ]
        record = {
            "benchmark": self.name,
            "command": shlex.join(["aroface", *sys.argv[1:]]),
            "machine": machine(*self.packages),
            "settings": dict(self.settings),
            "figures": figures,
            **self.details,
        }
        write_json(path, record)
        print(f"written: {path}")


def _line(figure: Figure) -> str:
    text = f"{figure.name:<52} {figure.value:>12,.4g} {figure.unit}"
    if figure.of_limit is not None:
        text += f"; limit {figure.limit:,.4g}, {100 * figure.of_limit:.3g} % of the limit"
    if figure.goal is None:
        return text
    bound = "at most" if figure.is_upper_limit else "at least"
    return f"{text} ({bound} {figure.goal:g}: {'reached' if figure.reached else 'NOT reached'})"


def measured(measurement: Measurement) -> dict[str, Any]:
    """A measurement for the JSON."""
    return {
        "items": measurement.items,
        "wall_s": measurement.wall_s,
        "cpu_s": measurement.cpu_s,
        "items_per_cpu_s": measurement.items_per_cpu_s,
        "items_per_s": measurement.items_per_s,
        "rounds": measurement.rounds,
    }
