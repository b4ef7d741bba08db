"""How metrics, conditions and values are written for people."""

from collections.abc import Iterable, Mapping
from typing import Any

from retrieval.results import support_mark

__all__ = [
    "condition_name",
    "difference",
    "interval",
    "meaning",
    "metric_name",
    "percent",
    "protocol_name",
    "with_interval",
]

_PROTOCOLS = {
    "compare": "Paired comparison",
    "tinyface": "TinyFace",
    "ijbb-11": "IJB-B, verification (1:1)",
    "ijbb-1N": "IJB-B, search (1:N)",
    "ijbc-11": "IJB-C, verification (1:1)",
    "ijbc-1N": "IJB-C, search (1:N)",
    "ijbs-surveillance_to_single": "IJB-S, surveillance to single",
    "ijbs-surveillance_to_booking": "IJB-S, surveillance to booking",
    "ijbs-surveillance_to_surveillance": "IJB-S, surveillance to surveillance",
    "ijbs-multiview_to_booking": "IJB-S, multi-view surveillance to booking",
    "ijbs-uav_to_booking": "IJB-S, UAV to booking",
    "survface-identification": "QMUL-SurvFace, identification",
    "survface-verification": "QMUL-SurvFace, verification",
    "scface": "SCface",
    "lfw": "LFW",
    "cfp_fp": "CFP-FP",
    "cfp_ff": "CFP-FF",
    "agedb_30": "AgeDB-30",
    "calfw": "CALFW",
    "cplfw": "CPLFW",
    "vgg2_fp": "VGG2-FP",
    "xqlfw": "XQLFW",
    "templates": "Templates",
    "lfw-lq": "Low-quality identification (LFW-LQ)",
    "fae-1": "Robustness to misalignment (FAE-1)",
    "identification": "Identification",
    "verification": "Verification",
}


def protocol_name(key: str) -> str:
    """The heading of a protocol's section."""
    return _PROTOCOLS.get(key, key)


def condition_name(key: str) -> str:
    """`20px` -> `20 px`."""
    return f"{key[:-2]} px" if key.endswith("px") and key[:-2].isdigit() else key


_NAMES = {
    "accuracy": "Pair accuracy",
    "accuracy_best_threshold": "Pair accuracy, threshold chosen on the same pairs",
    "map": "mAP (TinyFace's)",
    "auc": "Area under the ROC",
    "auc_tpir_l": "Area under TPIR (in list) by FPIR",
    "rank_1_mean": "Rank-1, mean over distances",
}


def metric_name(key: str) -> str:
    """`tpir@fpir=0.01` -> `TPIR at FPIR 1 %`; an unknown name stays as it is."""
    if key in _NAMES:
        return _NAMES[key]
    name, _, condition = key.partition("@")
    if condition.startswith("frozen:"):
        kind, _, rate = condition.removeprefix("frozen:").partition("=")
        return f"{name.upper()} at the frozen threshold of {kind.upper()} {_rate(rate)}"
    if name in ("tpir", "tar", "fmr", "fpir") and "=" in condition:
        kind, _, rate = condition.partition("=")
        return f"{name.upper()} at {kind.upper()} {_rate(rate)}"
    if name == "edc_area":
        return f"FNMR, mean over {_rate(condition)} discarded"
    if name.startswith("rank_1_first_"):
        return f"Rank-1, the first {name.removeprefix('rank_1_first_')} identities with two images"
    if name.startswith("area_"):
        of = f"{name.removeprefix('area_')}@{condition}"
        inner, _, sweep = of.rpartition("@")
        return f"{metric_name(inner)}, mean over {sweep}"
    if name.startswith("rank_") and name[5:].isdigit():
        return f"Rank-{name[5:]}" + (f", {condition_name(condition)}" if condition else "")
    return key


def meaning(keys: Iterable[str]) -> str:
    """One line on each kind of metric among these."""
    keys, lines = list(keys), []
    if any(key.startswith("rank_") for key in keys):
        lines.append("Rank-k: share of searches whose person is among the k best candidates; everyone is enrolled.")
    if any(key.startswith("tpir@") for key in keys):
        lines.append(
            "TPIR at FPIR x: share of enrolled people found at rank 1 above a threshold at which the share x of "
            "searches for strangers raises a false alarm."
        )
    if any(key.startswith("tar@") for key in keys):
        lines.append("TAR at FAR x: share of genuine pairs accepted when the share x of impostor pairs is accepted.")
    if any("@frozen:" in key for key in keys):
        lines.append("Frozen threshold: set on another set, applied to this one.")
    if any(key.startswith("edc_area") for key in keys):
        lines.append("FNMR over discarded: mean error while the pairs of lowest quality are left out; lower is better.")
    return " ".join(lines)


def _rate(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{100 * value:g} %" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def percent(value: float | None, *, digits: int = 1) -> str:
    """A share as percent; a dash for a value that does not exist."""
    if value is None:
        return "–"
    return f"{_hundredfold(value, digits)} %"


def _hundredfold(value: float, digits: int) -> str:
    """In percent; a value that would be rounded to nothing keeps its two leading digits."""
    return f"{100 * value:.2g}" if 0 < value < 0.5 * 10 ** (-2 - digits) else f"{100 * value:.{digits}f}"


def interval(entry: Mapping[str, Any]) -> str:
    """`12.3 – 14.5 %`, or nothing."""
    bounds = entry.get("ci95")
    return f"{' – '.join(_hundredfold(bound, 1) for bound in bounds)} %" if bounds else ""


def with_interval(entry: Mapping[str, Any] | None) -> str:
    """Value, its interval in brackets, and stars where too few false positives support it."""
    if entry is None:
        return ""
    if entry["value"] is None:
        return "–"
    bounds = entry.get("ci95")
    limits = f" [{', '.join(_hundredfold(bound, 1) for bound in bounds)}]" if bounds else ""
    return percent(entry["value"]) + limits + support_mark(entry)


def difference(ours: float | None, reference: float) -> str:
    """Ours minus the reference, in percentage points."""
    return "–" if ours is None else f"{100 * (ours - reference):+.1f} pp".replace("-", "−")
