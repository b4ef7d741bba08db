"""The second gate of an export: what a lower precision changes in the rates that a model is used for."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aroface.errors import ExportError
from aroface.types import Embedder

__all__ = ["AccuracyGate", "AccuracyLimits", "AccuracyReport", "MetricChange", "check_accuracy"]

#: An embedder to its rates on one set, by name; names begin with `rank_1`, `tar@` or `tpir@`. Values are in [0, 1].
Measure = Callable[[Embedder], Mapping[str, float]]


@dataclass(frozen=True)
class AccuracyLimits:
    """How far each rate may fall, as a difference of rates: 0.01 is one percentage point."""

    rank_1: float = 0.01
    tar: float = 0.01
    tpir: float = 0.01


@dataclass(frozen=True)
class AccuracyGate:
    """What is measured, and what may change."""

    measure: Measure
    set_name: str  #: for the report
    limits: AccuracyLimits = AccuracyLimits()


@dataclass(frozen=True)
class MetricChange:
    """One rate before and after."""

    name: str
    checkpoint: float
    exported: float
    allowed_fall: float

    @property
    def change(self) -> float:
        """Exported minus checkpoint."""
        return self.exported - self.checkpoint

    @property
    def can_tell(self) -> bool:
        """The rate of the checkpoint is high enough to fall further than allowed."""
        return self.checkpoint > self.allowed_fall

    @property
    def is_allowed(self) -> bool:
        """The rate has not fallen further than allowed; false for NaN."""
        return self.checkpoint - self.exported <= self.allowed_fall


@dataclass(frozen=True)
class AccuracyReport:
    """Every rate of the set, before and after."""

    set_name: str
    changes: tuple[MetricChange, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for the export report."""
        metrics = [asdict(entry) | {"change": entry.change, "can_tell": entry.can_tell} for entry in self.changes]
        return {"set": self.set_name, "metrics": metrics}


def check_accuracy(reference: Embedder, exported: Embedder, gate: AccuracyGate) -> AccuracyReport:
    """Measure both on the same set.

    Args:
        reference: the checkpoint in fp32.
        exported: the model under test.
        gate: the measurement and its limits.

    Raises:
        ExportError: a rate has fallen further than allowed, or none is high enough to tell.
    """
    before, after = gate.measure(reference), gate.measure(exported)
    changes = tuple(MetricChange(name, before[name], after[name], _limit(name, gate.limits)) for name in before)
    failed = [entry for entry in changes if not entry.is_allowed]
    if failed:
        what = ", ".join(f"{entry.name} {entry.checkpoint:.4f} -> {entry.exported:.4f}" for entry in failed)
        raise ExportError(
            f"The export costs more accuracy than is allowed on {gate.set_name}: {what} (may fall by "
            f"{', '.join(f'{entry.allowed_fall:g}' for entry in failed)}). No file was written. Calibrate on more "
            "faces of the kind the model will see (--calibration, --calibration-faces), take --precision fp16, or "
            "raise --max-rank1-drop, --max-tar-drop or --max-tpir-drop if the loss is acceptable."
        )
    if not any(entry.can_tell for entry in changes) and any(entry.allowed_fall < 1 for entry in changes):
        rates = ", ".join(f"{entry.name} {entry.checkpoint:.4f}" for entry in changes)
        raise ExportError(
            f"{gate.set_name} cannot tell what the export costs: every rate of the checkpoint is so low that it could "
            f"not fall further than allowed ({rates}). No file was written. Take an easier set or one with more people "
            "(--accuracy-set), a higher rate or a trained checkpoint; a limit of 1 for every rate waives the gate."
        )
    return AccuracyReport(gate.set_name, changes)


def _limit(name: str, limits: AccuracyLimits) -> float:
    kind = name.split("@", 1)[0]
    return {"rank_1": limits.rank_1, "tar": limits.tar, "tpir": limits.tpir}[kind]
