"""From groups of result records to the sections of a report; only differences of what is given are computed here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retrieval.report.curves import curve_blocks
from retrieval.report.document import Block, Plot, Section, Table
from retrieval.report.groups import Group, Record, System, group_results
from retrieval.report.inputs import ReportInputs
from retrieval.report.misalignment import misalignment_blocks
from retrieval.report.plots import plot_bars
from retrieval.report.published import published_table, reference_table
from retrieval.report.tables import (
    BRACKETS,
    STAR,
    counts_line,
    failure_table,
    number_table,
    side_by_side,
    systems_table,
)
from retrieval.report.wording import condition_name, interval, metric_name, percent, with_interval

__all__ = ["result_sections"]

_VERIFICATION = "verification"
_MOST_BARS = 14


def result_sections(inputs: ReportInputs) -> list[Section]:
    """One section per protocol and set, in the order given; file names of plots carry the protocol."""
    return [
        Section(group.title, tuple(_blocks(group, inputs))) for group in group_results(inputs.results, inputs.names)
    ]


def _blocks(group: Group, inputs: ReportInputs) -> list[Block]:
    if group.protocol == "compare":
        return [_comparison(system.record) for system in group.systems]
    conditions = group.first.get("conditions") or {}
    if "sweeps" in group.first:
        body = misalignment_blocks(group)
    elif conditions and not any("=" in name for name in conditions):
        body = _conditions(group)
    else:
        body = [*_plain(group), *_strata(group)]
    return [
        *counts_line(group),
        *body,
        *published_table(group),
        *reference_table(group, inputs.references),
        *failure_table(group),
        *systems_table(group),
    ]


def _plain(group: Group) -> list[Block]:
    """Any records with metrics and, perhaps, curves."""
    systems = group.systems
    keys = list(dict.fromkeys(key for system in systems for key in system.record["metrics"]))
    tables: list[Block] = [] if group.is_alone else [side_by_side(systems, keys, caption="Side by side")]
    curves = curve_blocks({system.label: system.record for system in systems}, group.prefix)
    return [*tables, number_table(systems, is_explained=bool(tables)), *curves]


def _comparison(record: Record) -> Table:
    """A - B of two systems."""
    rows = tuple(
        (
            metric_name(key),
            percent(entry["first"], digits=2),
            percent(entry["second"], digits=2),
            f"{100 * entry['value']:+.2f} pp".replace("-", "−"),
            interval(entry),
            "" if entry.get("p_value") is None else f"{entry['p_value']:.2g}",
        )
        for key, entry in record["metrics"].items()
    )
    names = [" and ".join(files) for files in record.get("inputs", {}).values()]
    said = f" A: {names[0]}; B: {names[1]}." if len(names) == 2 else ""
    return Table(
        ("metric", "A", "B", "A − B", "95 % interval", "McNemar p"),
        rows,
        note=f"Both saw the same trials. Intervals: paired bootstrap over subjects.{said}",
    )


def _strata(group: Group) -> list[Block]:
    """Rates by a covariate, all at the thresholds that were set on the whole."""
    conditions = {system.label: system.record.get("conditions") or {} for system in group.systems}
    names = list(dict.fromkeys(name for own in conditions.values() for name in own if "=" in name))
    if not names:
        return []
    keys = list(dict.fromkeys(key for own in conditions.values() for block in own.values() for key in block["metrics"]))
    covariate = names[0].partition("=")[0]
    rows = []
    for name in names:
        for key in keys:
            cells = [with_interval(own.get(name, {}).get("metrics", {}).get(key)) for own in conditions.values()]
            counts = next(own[name]["counts"] for own in conditions.values() if name in own)
            rows.append((name.partition("=")[2], metric_name(key), f"{_trials(key, counts):,}", *cells))
    blocks: list[Block] = [
        Table(
            (covariate, "metric", "trials", *conditions),
            tuple(rows),
            caption=f"By {covariate}",
            note=f"Every stratum at the threshold that was set on the whole. {BRACKETS}",
            text_columns=2,
        )
    ]
    metrics = group.first["metrics"]
    rates = [key.partition("@")[2] for key in keys if key.startswith(("tar@", "tpir@"))]
    supported = [rate for rate in rates for name in ("tar@", "tpir@") if metrics.get(name + rate, {}).get("supported")]
    shown = ["rank_1", *(name + rate for rate in supported[:1] for name in ("tar@", "tpir@", "fmr@", "fpir@"))]
    shown = [key for key in shown if key in keys]
    if len(names) <= _MOST_BARS:
        for key in shown:
            bars = {
                label: [own.get(name, {}).get("metrics", {}).get(key) for name in names]
                for label, own in conditions.items()
            }
            figure = plot_bars([n.partition("=")[2] for n in names], bars, x=covariate, y=f"{metric_name(key)} [%]")
            kind = key.partition("@")[0].replace("_", "-")
            blocks.append(
                Plot(
                    f"{group.prefix}-{covariate.lower()}-{kind}",
                    figure,
                    alt=f"{metric_name(key)} by {covariate}.",
                    caption=f"{metric_name(key)} by {covariate}, at one threshold; bars are 95 % confidence intervals.",
                )
            )
    return blocks


def _trials(key: str, counts: Mapping[str, int]) -> int:
    kind = key.partition("@")[0]
    name = {"tar": "genuine", "fmr": "impostor", "fpir": "non_mated"}.get(kind, "mated")
    return counts.get(name, 0)


def _conditions(group: Group) -> list[Block]:
    """A task with several conditions of the probes, and baselines beside the models."""
    verification = group.first["conditions"].get(_VERIFICATION)
    names = [name for name in group.first["conditions"] if name != _VERIFICATION]
    systems = group.systems
    blocks = _condition_tables(group, names)
    models = [system for system in systems if not system.is_baseline]
    if len(models) == 1:
        blocks += curve_blocks({name: models[0].record["conditions"][name] for name in names}, group.prefix)
    else:
        for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]]):
            own = {s.label: s.record["conditions"][name] for s in models if name in s.record["conditions"]}
            of = f"{condition_name(name)} probes"
            blocks += curve_blocks(own, f"{group.prefix}-{name}", of=of)
    other = [key for key in group.first["metrics"] if not key.startswith("rank_1@")]
    if other:
        blocks.append(side_by_side(systems, other, caption="Clean images"))
        blocks.append(number_table(models, other, is_explained=True))
    if verification:
        own = {system.label: system.record["conditions"].get(_VERIFICATION, {}) for system in systems}
        blocks += curve_blocks(own, f"{group.prefix}-{_VERIFICATION}", of="clean pairs")
    return blocks


def _condition_tables(group: Group, names: Sequence[str]) -> list[Block]:
    systems = group.systems
    columns = tuple(system.label for system in systems)
    descriptions = {name: group.first["conditions"][name].get("description", condition_name(name)) for name in names}
    rank_rows = tuple(
        (descriptions[name], *(with_interval(_entry(system, name, "rank_1")) for system in systems)) for name in names
    )
    open_keys = _open_set_keys(group.first["conditions"][name] for name in names)
    open_rows = tuple(
        (descriptions[name], metric_name(key), *(with_interval(_entry(system, name, key)) for system in systems))
        for name in names
        for key in open_keys
    )
    ranked = {system.label: [_entry(system, name, "rank_1") for name in names] for system in systems}
    blocks: list[Block] = [
        Table(
            ("probes", *columns),
            rank_rows,
            caption="Closed set: Rank-1",
            note=f"Share of probes whose person is the best match among all enrolled people. {BRACKETS}",
        ),
        Plot(
            f"{group.prefix}-conditions",
            plot_bars([descriptions[name] for name in names], ranked, x="probes", y="Rank-1 [%]"),
            alt=f"Rank-1 by condition of the probes for {', '.join(columns)}.",
            caption="Rank-1 by condition of the probes; bars are 95 % confidence intervals.",
        ),
    ]
    if open_rows:
        weak = any(cell.endswith("*") for row in open_rows for cell in row)
        blocks.append(
            Table(
                ("probes", "metric", *columns),
                open_rows,
                caption="Open set: part of the people are not enrolled",
                text_columns=2,
                note="Share of enrolled people found at rank 1 above the threshold at which the given share of "
                f"strangers raises a false alarm. {BRACKETS} {STAR if weak else ''}".strip(),
            )
        )
    return blocks


def _entry(system: System, condition: str, key: str) -> Mapping[str, Any] | None:
    block = system.record["conditions"].get(condition)
    entry: Mapping[str, Any] | None = block["metrics"].get(key) if block else None
    return entry


def _open_set_keys(blocks: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(key for block in blocks for key in block["metrics"] if key.startswith("tpir@")))
