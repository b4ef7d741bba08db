"""How metrics, conditions and values are written for people."""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "condition_name",
    "difference",
    "interval",
    "metric_name",
    "percent",
    "protocol_name",
    "system_name",
    "with_interval",
]

_SYSTEMS = {"model": "trained", "untrained": "untrained", "pixels": "raw pixels"}
_PROTOCOLS = {
    "lfw-lq": "Low-quality identification (LFW-LQ)",
    "fae-1": "Robustness to misalignment (FAE-1)",
    "identification": "Identification",
    "verification": "Verification",
}


def system_name(key: str) -> str:
    """What a column of a comparison is called."""
    return _SYSTEMS.get(key, key)


def protocol_name(key: str) -> str:
    """The heading of a protocol's section."""
    return _PROTOCOLS.get(key, key)


def condition_name(key: str) -> str:
    """`20px` -> `20 px`."""
    return f"{key[:-2]} px" if key.endswith("px") and key[:-2].isdigit() else key


def metric_name(key: str) -> str:
    """`tpir@fpir=0.01` -> `TPIR at FPIR 1 %`; an unknown name stays as it is."""
    name, _, condition = key.partition("@")
    if name in ("tpir", "tar") and "=" in condition:
        kind, _, rate = condition.partition("=")
        return f"{name.upper()} at {kind.upper()} {_rate(rate)}"
    if name.startswith("rank_1_first_"):
        return f"Rank-1, the first {name.removeprefix('rank_1_first_')} identities with two images"
    if name.startswith("area_"):
        of = f"{name.removeprefix('area_')}@{condition}"
        inner, _, sweep = of.rpartition("@")
        return f"{metric_name(inner)}, mean over {sweep}"
    if name.startswith("rank_") and name[5:].isdigit():
        return f"Rank-{name[5:]}" + (f", {condition_name(condition)}" if condition else "")
    if name == "accuracy":
        return "Best pair accuracy"
    return key


def _rate(text: str) -> str:
    try:
        return f"{100 * float(text):g} %"
    except ValueError:
        return text


def percent(value: float | None, *, digits: int = 1) -> str:
    """A share as percent; a dash for a value that does not exist."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def interval(entry: Mapping[str, Any]) -> str:
    """`12.3 – 14.5 %`, or nothing."""
    bounds = entry.get("ci95")
    return f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f} %" if bounds else ""


def with_interval(entry: Mapping[str, Any] | None) -> str:
    """Value, its interval in brackets, and a star where too few false positives support it."""
    if entry is None:
        return ""
    if entry["value"] is None:
        return "–"
    star = "" if entry.get("supported", True) else " *"
    bounds = entry.get("ci95")
    return percent(entry["value"]) + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "") + star


def difference(ours: float | None, reference: float) -> str:
    """Ours minus the reference, in percentage points."""
    return "–" if ours is None else f"{100 * (ours - reference):+.1f} pp".replace("-", "−")
