"""FAE-1 in a report: accuracy against misalignment, several models in each figure, both policies for the threshold."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from retrieval.report.document import Block, Plot, Table
from retrieval.report.groups import Group, System
from retrieval.report.plots_fae import plot_change_bars, plot_misalignment
from retrieval.report.tables import number_table
from retrieval.report.wording import metric_name, percent

__all__ = ["misalignment_blocks"]

_FROZEN = {
    "fnmr_frozen": "FNMR, clean threshold",
    "fmr_frozen": "FMR, clean threshold",
    "fnir_frozen": "FNIR, clean threshold",
    "fpir_frozen": "FPIR, clean threshold",
}
_PAIRS, _SEARCHES = ("fnmr_frozen", "fmr_frozen"), ("fnir_frozen", "fpir_frozen")


def misalignment_blocks(group: Group) -> list[Block]:
    """Figures and tables of one set."""
    systems = {system.label: system.record["sweeps"] for system in group.systems}
    keys = list(group.first["sweeps"][0]["points"][0]["metrics"])
    accuracy = {key: metric_name(key) for key in keys if key not in _FROZEN}
    sides = group.first.get("settings", {}).get("sides", "probe")
    whose = "both sides" if sides == "both" else "the probes"
    blocks: list[Block] = []
    if len(systems) == 1:
        blocks.append(_sweep_plot(group, "accuracy", systems, accuracy, _RECALIBRATED.format(whose=whose)))
    else:
        for key, name in accuracy.items():
            caption = f"{name}. {_RECALIBRATED.format(whose=whose)}"
            blocks.append(_sweep_plot(group, re.sub(r"\W+", "-", key), systems, {key: name}, caption))
    for pair, what in ((_PAIRS, _FROZEN_PAIRS), (_SEARCHES, _FROZEN_SEARCHES)):
        if all(key in keys for key in pair):
            kind = "frozen" if pair is _PAIRS else "frozen-searches"
            blocks.append(_sweep_plot(group, kind, systems, {key: _FROZEN[key] for key in pair}, what))
    blocks += [_change(group, next(iter(accuracy))), _areas(group)]
    clean = [key for key in group.first["metrics"] if not key.startswith("area_")]
    return [*blocks, number_table(group.systems, clean), _levels(group, keys)]


_RECALIBRATED = "Accuracy against misalignment of {whose}; the threshold is set anew at every severity. Flat is robust."
_FROZEN_PAIRS = (
    "Errors of a system whose threshold was set once on clean probes: genuine pairs rejected (FNMR) and impostor pairs "
    "accepted (FMR)."
)
_FROZEN_SEARCHES = (
    "The same for searches: enrolled people missed at rank 1 (FNIR) and strangers who raise a false alarm (FPIR)."
)


def _sweep_plot(
    group: Group,
    kind: str,
    systems: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, str],
    caption: str,
) -> Plot:
    is_error = all(key in _FROZEN for key in metrics)
    y = "error rate" if is_error else "share of probes or pairs [%]"
    return Plot(
        f"{group.prefix}-{kind}",
        plot_misalignment(systems, metrics, y=y, is_log=is_error),
        alt=f"{' and '.join(metrics.values())} against angle, shift, scale, combined severity and landmark error.",
        caption=caption,
    )


def _change(group: Group, key: str) -> Plot:
    """Change from aligned to the end of each sweep."""
    names = [sweep["name"] for sweep in group.first["sweeps"]]
    series = {
        system.label: [min(_difference(point, system, key) for point in sweep["points"]) for sweep in own["sweeps"]]
        for system in group.systems
        for own in (system.record,)
    }
    return Plot(
        f"{group.prefix}-change",
        plot_change_bars(names, series, y=f"change of {metric_name(key)} [pp]"),
        alt=f"Largest loss of {metric_name(key)} in every sweep.",
        caption=f"Largest loss of {metric_name(key)} in every sweep, in percentage points of the aligned state.",
    )


def _difference(point: Mapping[str, Any], system: System, key: str) -> float:
    clean = system.record["metrics"][key]["value"]
    return float(point["metrics"][key] - clean)


def _areas(group: Group) -> Table:
    keys = [key for key in group.first["metrics"] if key.startswith("area_")]
    rows = tuple(
        (metric_name(key), *(percent(s.record["metrics"].get(key, {}).get("value")) for s in group.systems))
        for key in keys
    )
    return Table(
        ("summary", *(system.label for system in group.systems)),
        rows,
        caption="Area under each curve",
        note="Mean of the curve over the range of the sweep: 100 % would be perfect at every severity.",
    )


def _levels(group: Group, keys: Sequence[str]) -> Table:
    rows = []
    several = not group.is_alone
    for number, sweep in enumerate(group.first["sweeps"]):
        unit = f" {sweep['unit']}" if sweep["unit"] else ""
        for place, level in enumerate(sweep["points"]):
            for system in group.systems:
                point = system.record["sweeps"][number]["points"][place]
                values = (_mean(point["metrics"].get(key), point["sd"].get(key)) for key in keys)
                who = (system.label,) if several else ()
                rows.append((sweep["name"], f"{level['severity']:g}{unit}", *who, f"{point['nme']:.3f}", *values))
    names = (_FROZEN.get(key, metric_name(key)) for key in keys)
    return Table(
        ("sweep", "level", *(("system",) if several else ()), "NME", *names),
        tuple(rows),
        note="NME: mean distance that the five landmarks move, as a share of the distance between the eyes; ± is the "
        "standard deviation between trials.",
        caption="Every level",
        text_columns=3 if several else 2,
    )


def _mean(value: float | None, sd: float | None) -> str:
    return percent(value) + ("" if sd is None else f" ± {100 * sd:.1f}")
