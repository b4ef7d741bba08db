"""The best checkpoint so far, by one number of one evaluation set; a small file beside the checkpoints names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aroface.files import read_json, write_json

__all__ = ["BEST_FILE", "Best", "read_best", "write_best"]

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """What was best, and by what."""

    step: int  #: whose checkpoint is kept
    set: str  #: evaluation set that it was selected on
    metric: str  #: higher is better
    value: float

    def record(self) -> dict[str, Any]:
        """For JSON; says that the number is no result."""
        return {
            "step": self.step,
            "checkpoint": f"step-{self.step:08d}",
            "selected_on": {"set": self.set, "metric": self.metric, "value": self.value},
            "note": f"Selected on {self.set}: its numbers there are optimistic. Report it on another set.",
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> Self | None:
        """The inverse of `record`; None for None."""
        if record is None:
            return None
        by = record["selected_on"]
        return cls(int(record["step"]), str(by["set"]), str(by["metric"]), float(by["value"]))


def write_best(run: Path, best: Best | None) -> None:
    """Name the best checkpoint of a run, or take the name away."""
    if best is None:
        (run / BEST_FILE).unlink(missing_ok=True)
    else:
        write_json(run / BEST_FILE, best.record())


def read_best(run: Path) -> Best | None:
    """The best checkpoint that a run names, None where it names none."""
    path = run / BEST_FILE
    return Best.from_record(read_json(path)) if path.is_file() else None
