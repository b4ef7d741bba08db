"""From result records to the sections of a report; nothing is computed here but differences of what is given."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retrieval.metrics.rules import MIN_SUPPORTED
from retrieval.report.document import Block, Paragraph, Plot, Section, Table
from retrieval.report.inputs import ReportInputs
from retrieval.report.plots import (
    plot_bars,
    plot_cmc,
    plot_error_tradeoff,
    plot_histogram,
    plot_misalignment,
)
from retrieval.report.wording import (
    condition_name,
    difference,
    interval,
    metric_name,
    percent,
    protocol_name,
    system_name,
    with_interval,
)

__all__ = ["result_sections"]

Record = Mapping[str, Any]

_STAR = f"* fewer than {MIN_SUPPORTED} false positives stand behind the threshold: read it as a rough indication."
_BRACKETS = "Brackets hold the 95 % confidence interval."
_VERIFICATION = "verification"


def result_sections(inputs: ReportInputs) -> list[Section]:
    """One section per result, in the order given; file names of plots carry the protocol."""
    sections = []
    seen: dict[str, int] = {}
    for record in inputs.results:
        protocol = str(record["protocol"])
        seen[protocol] = seen.get(protocol, 0) + 1
        prefix = protocol if seen[protocol] == 1 else f"{protocol}-{seen[protocol]}"
        heading = protocol_name(protocol) + (f" ({seen[protocol]})" if seen[protocol] > 1 else "")
        if "sweeps" in record:
            blocks = _misalignment(record, prefix)
        elif "conditions" in record:
            blocks = _conditions(record, prefix)
        else:
            blocks = _plain(record, prefix)
        reference = _reference_table(record, inputs)
        sections.append(Section(heading, (*_counts(record), *blocks, *reference)))
    return sections


def _counts(record: Record) -> list[Block]:
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in record["counts"].items() if value)
    return [Paragraph(f"Counts: {counts}. Thresholds follow the rule “{record['rule']}”.")]


def _plain(record: Record, prefix: str) -> list[Block]:
    """Any record with metrics and, perhaps, curves."""
    return [_metric_table(record["metrics"]), *_curves({"": record}, prefix)]


def _metric_table(metrics: Mapping[str, Any]) -> Table:
    rows = []
    for key, entry in metrics.items():
        value = percent(entry["value"]) + ("" if entry.get("supported", True) or entry["value"] is None else " *")
        more = entry.get("reason", "") if entry["value"] is None else interval(entry)
        listed = percent(entry["value_rank_l"]) if entry.get("value_rank_l") is not None else ""
        rows.append((metric_name(key), value, more, listed, _threshold(entry)))
    columns = ("metric", "value", "95 % interval", "in list", "threshold")
    used = [index for index in range(len(columns)) if index < 2 or any(row[index] for row in rows)]
    return Table(
        tuple(columns[index] for index in used),
        tuple(tuple(row[index] for index in used) for row in rows),
        note=_meaning(metrics),
    )


def _threshold(entry: Mapping[str, Any]) -> str:
    return f"{entry['threshold']:.3f}" if entry.get("threshold") is not None else ""


def _meaning(metrics: Mapping[str, Any]) -> str:
    """One line on each kind of metric that the table holds."""
    lines = []
    if any(name.startswith("rank_") for name in metrics):
        lines.append("Rank-k: share of searches whose person is among the k best candidates; everyone is enrolled.")
    if any(name.startswith("tpir@") for name in metrics):
        lines.append(
            "TPIR at FPIR x: share of enrolled people found at rank 1 above a threshold at which the share x of "
            "searches for strangers raises a false alarm. “In list” drops the demand for rank 1."
        )
    if any(name.startswith("tar@") for name in metrics):
        lines.append("TAR at FAR x: share of genuine pairs accepted when the share x of impostor pairs is accepted.")
    if "accuracy" in metrics:
        lines.append("Best pair accuracy takes its threshold from the same pairs, so it is optimistic.")
    if any(not entry.get("supported", True) and entry["value"] is not None for entry in metrics.values()):
        lines.append(_STAR)
    return " ".join(lines)


def _curves(blocks: Mapping[str, Record], prefix: str) -> list[Block]:
    """CMC, identification errors, DET and scores of labelled blocks, as far as they have them."""
    found: list[Block] = []
    cmc = {label: block["curves"]["cmc"] for label, block in blocks.items() if block["curves"].get("cmc")}
    if cmc:
        found.append(
            Plot(
                f"{prefix}-cmc",
                plot_cmc(_labelled(cmc)),
                alt=f"Cumulative match curve; {_first_values(cmc)}.",
                caption="Cumulative match (closed set): searches whose person is among the first k candidates.",
            )
        )
    iet = {
        label if len(block["curves"]["iet"]) == 1 else f"{label} gallery {number}".strip(): {
            "x": curve["fpir"],
            "y": curve["fnir"],
            "negatives": curve["non_mated"],
        }
        for label, block in blocks.items()
        for number, curve in enumerate(block["curves"].get("iet", ()), start=1)
        if curve["fpir"]
    }
    if iet:
        figure = plot_error_tradeoff(_labelled(iet), x="FPIR", y="FNIR (rank 1)", negatives_are="non-mated searches")
        found.append(
            Plot(
                f"{prefix}-fnir-fpir",
                figure,
                alt="False negative against false positive identification rate on logarithmic axes.",
                caption="Identification errors (open set): enrolled people missed against strangers who raise a false "
                f"alarm. Lower is better. In the grey range fewer than {MIN_SUPPORTED} false alarms support the curve.",
            )
        )
    for label, block in blocks.items():
        found += _verification_plots(block["curves"], "-".join(part for part in (prefix, label) if part))
    return found


def _verification_plots(curves: Mapping[str, Any], prefix: str) -> list[Block]:
    found: list[Block] = []
    if det := curves.get("det"):
        curve = {"model": {"x": det["fmr"], "y": det["fnmr"], "negatives": det["impostors"]}}
        found.append(
            Plot(
                f"{prefix}-det",
                plot_error_tradeoff(_labelled(curve), x="FMR", y="FNMR", negatives_are="impostor pairs"),
                alt="Detection error trade-off: false non-match against false match rate on logarithmic axes.",
                caption="Detection error trade-off: genuine pairs rejected against impostor pairs accepted. Lower is "
                f"better. In the grey range fewer than {MIN_SUPPORTED} false matches support the curve.",
            )
        )
    if scores := curves.get("scores"):
        found.append(
            Plot(
                f"{prefix}-scores",
                plot_histogram(scores),
                alt="Histogram of the cosines of genuine and of impostor pairs.",
                caption="Scores of clean pairs. The less the two overlap, the better the model tells people apart.",
            )
        )
    return found


def _labelled(curves: Mapping[str, Any]) -> dict[str, Any]:
    return {condition_name(label) or "model": curve for label, curve in curves.items()}


def _first_values(curves: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(
        f"{condition_name(label) or 'model'} {percent(values[0])} at rank 1" for label, values in curves.items()
    )


def _conditions(record: Record, prefix: str) -> list[Block]:
    """A task with several conditions, and baselines beside the model."""
    systems = {"model": record, **record.get("baselines", {})}
    verification = record["conditions"].get(_VERIFICATION)
    names = [name for name in record["conditions"] if name != _VERIFICATION]
    searched = {name: record["conditions"][name] for name in names}
    columns = tuple(system_name(key) for key in systems)
    rank_rows = tuple(
        (condition_name(name), *(with_interval(_entry(system, name, "rank_1")) for system in systems.values()))
        for name in names
    )
    open_keys = _open_set_keys(searched.values())
    open_rows = tuple(
        (
            condition_name(name),
            metric_name(key),
            *(with_interval(_entry(system, name, key)) for system in systems.values()),
        )
        for name in names
        for key in open_keys
    )
    ranked = {system_name(key): [_entry(system, name, "rank_1") for name in names] for key, system in systems.items()}
    blocks: list[Block] = [
        Table(
            ("probes", *columns),
            rank_rows,
            caption="Closed set: Rank-1",
            note="Share of probes whose person is the best match among all enrolled people, with clean probes and with "
            f"probes shrunk to the given face size, compressed and misaligned. {_BRACKETS}",
        ),
        Plot(
            f"{prefix}-sizes",
            plot_bars(
                [condition_name(name) for name in names], ranked, x="probes: clean, or face size", y="Rank-1 [%]"
            ),
            alt=f"Rank-1 per probe size for {', '.join(columns)}.",
            caption="Rank-1 by probe size; bars are 95 % confidence intervals.",
        ),
    ]
    if open_rows:
        blocks.append(
            Table(
                ("probes", "metric", *columns),
                open_rows,
                caption="Open set: part of the people are not enrolled",
                text_columns=2,
                note="Share of enrolled people found at rank 1 above the threshold at which the given share of "
                f"strangers raises a false alarm. {_BRACKETS} {_STAR if _any_weak(open_rows) else ''}".strip(),
            )
        )
    blocks += _curves(searched, prefix)
    other = [key for key in record["metrics"] if not key.startswith("rank_1@")]
    rows = tuple((metric_name(key), *(with_interval(s["metrics"].get(key)) for s in systems.values())) for key in other)
    if rows:
        note = f"{_meaning({key: record['metrics'][key] for key in other})} {_BRACKETS}"
        blocks.append(Table(("metric", *columns), rows, caption="Clean images", note=note))
    if verification:
        blocks += _verification_plots(verification["curves"], f"{prefix}-{_VERIFICATION}")
    return blocks


def _entry(system: Record, condition: str, key: str) -> Mapping[str, Any] | None:
    block = system["conditions"].get(condition)
    entry: Mapping[str, Any] | None = block["metrics"].get(key) if block else None
    return entry


def _open_set_keys(blocks: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(key for block in blocks for key in block["metrics"] if key.startswith("tpir@")))


def _any_weak(rows: Iterable[Sequence[str]]) -> bool:
    return any(cell.endswith("*") for row in rows for cell in row)


def _misalignment(record: Record, prefix: str) -> list[Block]:
    """Accuracy against the amount of misalignment, re-calibrated and with the clean threshold kept."""
    sweeps = record["sweeps"]
    keys = list(sweeps[0]["points"][0]["metrics"])
    rows = []
    for sweep in sweeps:
        unit = f" {sweep['unit']}" if sweep["unit"] else ""
        for point in sweep["points"]:
            values = (_mean(point["metrics"][key], point["sd"][key]) for key in keys)
            rows.append((sweep["name"], f"{point['severity']:g}{unit}", f"{point['nme']:.3f}", *values))
    kept = {"fnmr_frozen": "FNMR", "fmr_frozen": "FMR"}
    accuracy = {key: metric_name(key) for key in keys if key not in kept}
    names = {key: f"{label}, clean threshold" for key, label in kept.items()} | accuracy
    blocks: list[Block] = [
        Plot(
            f"{prefix}-accuracy",
            plot_misalignment(sweeps, accuracy, y="share of probes or pairs [%]"),
            alt=f"{' and '.join(accuracy.values())} against angle, shift, scale and combined severity.",
            caption="Accuracy against misalignment of the probes; the threshold is set anew at every severity. Flat is "
            "robust.",
        )
    ]
    if all(key in keys for key in kept):
        figure = plot_misalignment(sweeps, {key: names[key] for key in kept}, y="error rate [%]")
        blocks.append(
            Plot(
                f"{prefix}-frozen",
                figure,
                alt="Error rates with the threshold of clean probes kept, against the amount of misalignment.",
                caption="Errors of a system whose threshold was set once on clean probes: genuine pairs rejected "
                "(FNMR) and impostor pairs accepted (FMR).",
            )
        )
    areas = {key: entry for key, entry in record["metrics"].items() if key.startswith("area_")}
    if areas:
        blocks.append(
            Table(
                ("summary", "value"),
                tuple((metric_name(key), percent(entry["value"])) for key, entry in areas.items()),
                note="Mean of the curve over the range of the sweep: 100 % would be perfect at every severity.",
            )
        )
    table = Table(
        ("sweep", "level", "NME", *(names.get(key, metric_name(key)) for key in keys)),
        tuple(rows),
        note="NME: mean distance that the five landmarks move, as a share of the distance between the eyes.",
        caption="Every level",
    )
    return [*blocks, table]


def _mean(value: float, sd: float | None) -> str:
    return percent(value) + ("" if sd is None else f" ± {100 * sd:.1f}")


def _reference_table(record: Record, inputs: ReportInputs) -> list[Block]:
    """Ours beside published values, where some were given for this protocol."""
    rows = []
    for key, entry in record["metrics"].items():
        reference = inputs.reference(str(record["protocol"]), key)
        if reference is not None:
            rows.append(
                (
                    metric_name(key),
                    percent(entry["value"], digits=2),
                    percent(reference.value, digits=2),
                    difference(entry["value"], reference.value),
                    reference.source,
                )
            )
    if not rows:
        return []
    return [
        Table(
            ("metric", "ours", "reference", "difference", "source"),
            tuple(rows),
            caption="Beside published values",
            note="pp: percentage points; positive means that ours is higher.",
        )
    ]
