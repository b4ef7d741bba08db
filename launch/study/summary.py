"""From the results of the runs to one table: means, spreads, and differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from aroface.files import read_json
from launch.study.design import Budget, Study
from launch.study.runner import RESULTS, is_finished, run_directory

__all__ = ["METRICS", "Difference", "Row", "Summary", "paired", "summarise"]

#: Metric -> heading; all are shares, higher is better.
METRICS = {
    "clean": "Rank-1, clean",
    "low_quality": "Rank-1, low quality",
    "misaligned": "Rank-1, misaligned",
    "tar": "TAR at FAR 1e-2",
}

#: Name of the rows that hold the differences of all heads together.
ALL_HEADS = "all heads"


@dataclass(frozen=True)
class Difference:
    """An alignment minus a reference, paired by seed (and head)."""

    mean: float
    low: float  #: of the 95 % interval of Student's t; nan with one pair
    high: float
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """For the record; an interval that does not exist is null."""
        interval = None if math.isnan(self.low) else [self.low, self.high]
        return {"mean": self.mean, "ci95": interval, "pairs": self.pairs}


@dataclass(frozen=True)
class Row:
    """One alignment under one budget."""

    budget: Budget
    head: str
    alignment: str
    epochs: float
    values: Mapping[str, Sequence[float]]  #: metric -> one value per finished seed
    differences: Mapping[str, Mapping[str, Difference]]  #: reference -> metric -> difference


@dataclass(frozen=True)
class Summary:
    """What a study found."""

    rows: Sequence[Row]
    finished: int
    planned: int
    unsupported: Sequence[str] = ()  #: metrics that too few false matches stand behind in a run at least


def summarise(study: Study, out: Path) -> Summary:
    """Collect the finished runs; seeds that one of two compared arms lacks are left out of their difference."""
    runs = list(study.runs())
    found = {(run.arm, run.seed): _values(run_directory(out, run)) for run in runs if is_finished(out, run)}
    epochs = {run.arm: run.epochs for run in runs}
    config = study.config

    def of(head: str, alignment: str, budget: Budget) -> dict[int, dict[str, float]]:
        arm = study.arm_of(head, alignment, budget)
        return {seed: found[arm, seed] for seed in config.seeds if (arm, seed) in found}

    rows = []
    for budget, alignment in product(config.budgets, config.alignments):
        for head in config.heads:
            own = of(head, alignment, budget)
            values = {name: [result[name] for result in own.values()] for name in METRICS}
            differences = {
                reference: _differences([(own, of(head, reference, budget))])
                for reference in config.references
                if reference != alignment
            }
            rows.append(
                Row(budget, head, alignment, epochs[study.arm_of(head, alignment, budget)], values, differences)
            )
        if len(config.heads) > 1:
            together = {
                reference: _differences(
                    [(of(head, alignment, budget), of(head, reference, budget)) for head in config.heads]
                )
                for reference in config.references
                if reference != alignment
            }
            rows.append(Row(budget, ALL_HEADS, alignment, rows[-1].epochs, {}, together))
    directories = [run_directory(out, run) for run in runs if (run.arm, run.seed) in found]
    unsupported = [name for name in METRICS if any(not _is_supported(directory, name) for directory in directories)]
    return Summary(rows, len(found), len(runs), unsupported)


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of first - second with the 95 % interval of Student's t over the pairs.

    Trainings differ by their seed far more than two evaluations of one model do by their probes, so the seeds are what
    is counted.
    """
    from scipy.stats import t

    gains = np.asarray(first, float) - np.asarray(second, float)
    mean = float(gains.mean())
    if len(gains) < 2:
        return Difference(mean, math.nan, math.nan, len(gains))
    half = float(t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / math.sqrt(len(gains)))
    return Difference(mean, mean - half, mean + half, len(gains))


def _differences(
    sides: Sequence[tuple[Mapping[int, Mapping[str, float]], Mapping[int, Mapping[str, float]]]],
) -> dict[str, Difference]:
    pairs = [(own[seed], other[seed]) for own, other in sides for seed in own if seed in other]
    if not pairs:
        return {}
    return {name: paired([a[name] for a, _ in pairs], [b[name] for _, b in pairs]) for name in METRICS}


def _is_supported(directory: Path, name: str) -> bool:
    """Whether the evaluation says that a rate at a false accept rate is one that can be told (rule of 30)."""
    if name != "tar":
        return True
    return bool(read_json(directory / RESULTS["lfw-lq"])["metrics"]["tar@far=1e-2"].get("supported", True))


def _values(directory: Path) -> dict[str, float]:
    """The metrics of one run; `misaligned` is the mean over severities 0 to 1 of the combined FAE-1 sweep."""
    low_quality = read_json(directory / RESULTS["lfw-lq"])["metrics"]
    misaligned = read_json(directory / RESULTS["fae"])["metrics"]
    sizes = [entry["value"] for name, entry in low_quality.items() if name.startswith("rank_1@") and "px" in name]
    return {
        "clean": low_quality["rank_1@clean"]["value"],
        "low_quality": float(np.mean(sizes)),
        "misaligned": misaligned["area_rank_1@severity"]["value"],
        "tar": low_quality["tar@far=1e-2"]["value"],
    }
