"""The tables that every group of results has: who was evaluated how, every number with its K, and what failed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retrieval.metrics.rules import MIN_SUPPORTED
from retrieval.report.document import Block, Paragraph, Table
from retrieval.report.groups import Group, Record, System, model_of
from retrieval.report.wording import interval, meaning, metric_name, percent, with_interval
from retrieval.results import support_mark

__all__ = ["BRACKETS", "STAR", "counts_line", "failure_table", "number_table", "side_by_side", "systems_table"]

BRACKETS = "Brackets hold the 95 % confidence interval."
STAR = f"* fewer than {MIN_SUPPORTED} false positives stand behind the threshold: read it as a rough indication. "
STAR += "** not even one: the rate is undefined on so few comparisons, the value that at the highest negative score."


def counts_line(group: Group) -> list[Block]:
    """Size of the set, and the rule."""
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in group.first["counts"].items() if value)
    rules = list(dict.fromkeys(str(system.record["rule"]) for system in group.systems))
    said = f"the rule “{rules[0]}”" if len(rules) == 1 else f"several rules ({', '.join(rules)}): see the table"
    return [Paragraph(f"Counts: {counts}. Thresholds follow {said}.")]


def systems_table(group: Group) -> list[Block]:
    """Model, preparation of the images, fusion and rule of every system."""
    rows = []
    for system in group.systems:
        record = system.record
        prepared = record.get("preprocessing") or {}
        contract = prepared.get("contract") or {}
        model = record.get("model") or record.get("inputs", {}).get("model") or {}
        flip = {"sum": "F1", "none": "F0"}.get(str(prepared.get("flip", model.get("flip"))), "?")
        size, colour = contract.get("image_size"), str(contract.get("colour_order", "")).upper()
        rows.append(
            (
                system.label,
                model_of(record) or "not said",
                f"{size} px {colour}" if size else "not said",
                str(prepared.get("alignment", "not said")),
                " ".join(part for part in (str(record.get("pooling", "")).partition(", F")[0], flip) if part),
                str(record.get("similarity", "cosine")),
                str(record["rule"]),
            )
        )
    columns = ("system", "model", "input", "alignment", "fusion", "score", "rule")
    note = "Fusion: N1 keeps the norm of a sample, D1 weights by its detector score, F1 adds the mirror image."
    return [Table(columns, tuple(rows), caption="What was evaluated", note=note, text_columns=len(columns))]


def side_by_side(systems: Sequence[System], keys: Iterable[str], *, caption: str) -> Table:
    """One row per metric, one column per system."""
    keys = list(keys)
    rows = tuple(
        (metric_name(key), *(with_interval(system.record["metrics"].get(key)) for system in systems)) for key in keys
    )
    weak = any(cell.endswith("*") for row in rows for cell in row)
    note = " ".join(part for part in (meaning(keys), BRACKETS, STAR if weak else "") if part)
    return Table(("metric", *(system.label for system in systems)), rows, caption=caption, note=note)


def number_table(systems: Sequence[System], keys: Iterable[str] | None = None, *, is_explained: bool = False) -> Table:
    """Every number with its interval, K, realised rate and threshold.

    Args:
        systems: whose.
        keys: which metrics; None: all.
        is_explained: another table says what they mean.
    """
    names = list(dict.fromkeys(key for system in systems for key in system.record["metrics"])) if keys is None else keys
    rows = [
        (metric_name(key), system.label, *_cells(entry), str(system.record["rule"]))
        for key in names
        for system in systems
        if (entry := system.record["metrics"].get(key)) is not None
    ]
    columns = ("metric", "system", "value", "95 % interval", "in list", "K", "realised", "threshold", "rule")
    used = [i for i in range(len(columns)) if i in (0, 2) or any(row[i] for row in rows)]
    used = [i for i in used if i != 1 or len(systems) > 1]
    note = (
        "K: false positives that the rate allows; realised: their rate at the threshold. “In list” drops the demand "
        f"for rank 1. {STAR}"
    )
    return Table(
        tuple(columns[i] for i in used),
        tuple(tuple(row[i] for i in used) for row in rows),
        caption="Every number",
        note=note if is_explained else f"{meaning(names)} {note}".strip(),
        text_columns=1 + (len(systems) > 1),
    )


def _cells(entry: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    if entry["value"] is None:
        return "–", str(entry.get("reason", "")), "", "", "", ""
    listed = percent(entry["value_rank_l"]) if entry.get("value_rank_l") is not None else ""
    k, realised, threshold = (entry.get(name) for name in ("k", "realised", "threshold"))
    return (
        percent(entry["value"], digits=2) + support_mark(entry),
        interval(entry),
        listed,
        "" if k is None else f"{k:,}",
        "" if realised is None else f"{realised:.2e}",
        "" if threshold is None else f"{threshold:.4f}",
    )


_FAILURES = {
    "missing": "images missing or unreadable",
    "fte_samples": "samples without a usable embedding",
    "fte_probes": "probes that failed to enrol",
    "fte_gallery": "gallery entries that failed to enrol",
    "fte_pairs": "pairs with a side that failed",
    "missing_pairs": "listed pairs left out",
    "tied_ranks": "searches whose rank hangs on a tie",
}


def failure_table(group: Group) -> list[Block]:
    """What could not be enrolled or compared; zeros are said, too."""
    names = [name for name in _FAILURES if any(name in s.record["counts"] for s in group.systems)]
    if not names:
        return []
    rows = []
    for name in names:
        found = (system.record["counts"].get(name) for system in group.systems)
        rows.append((_FAILURES[name], *("" if value is None else f"{value:,}" for value in found)))
    rates = dict.fromkeys(
        key for s in group.systems for key in s.record["metrics"] if key.startswith(("tar@", "tpir@"))
    )
    for key in ("rank_1", "rank_5", *rates):
        own = [_enrolled(system.record, key) for system in group.systems]
        if any(own):
            rows.append((f"{metric_name(key)} where both sides were enrolled", *own))
    return [
        Table(
            ("failures", *(system.label for system in group.systems)),
            tuple(rows),
            caption="Failures",
            note="A probe, a mate or a genuine pair that failed counts as a miss, an impostor that failed as rejected.",
        )
    ]


def _enrolled(record: Record, key: str) -> str:
    value = record["metrics"].get(key, {}).get("value_enrolled_only")
    return "" if value is None else percent(value, digits=2)
