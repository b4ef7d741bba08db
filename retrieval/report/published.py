"""Published values beside ours, with the rule that each was made by."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from retrieval.report.document import Block, Table
from retrieval.report.groups import Group, Record
from retrieval.report.wording import difference, metric_name, percent

__all__ = ["PublishedRow", "Reference", "published_rows", "published_table", "reference_table"]

#: Metrics of published rows that are shown, those that most rows have.
_MOST_COLUMNS = 4


@dataclass(frozen=True)
class Reference:
    """A value that the user wants to compare with."""

    protocol: str
    metric: str
    value: float
    source: str  #: paper and table


@dataclass(frozen=True)
class PublishedRow:
    """One model on one protocol, as its source prints it."""

    protocol: str
    method: str
    backbone: str
    data: str
    rule: str  #: threshold rule and pooling, in the words of this project
    source: str
    metrics: Mapping[str, float]  #: as shares


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All rows that come with this version."""
    text = files("retrieval.report").joinpath("published.json").read_text(encoding="utf-8")
    return tuple(PublishedRow(**row) for row in json.loads(text)["rows"])


def published_table(group: Group) -> list[Block]:
    """Ours on top of the published rows of the same protocol, for the metrics that both have."""
    rows = [row for row in published_rows() if row.protocol == group.protocol]
    ours = {_key(name): entry for name, entry in group.first["metrics"].items()}
    counts = Counter(_key(name) for row in rows for name in row.metrics)
    names = [name for name in ours if name in dict(counts.most_common(_MOST_COLUMNS))]
    if not names:
        return []
    body = [
        (system.label, "", _rule(system.record), *_own(system.record, names), "this evaluation")
        for system in group.systems
        if not system.is_baseline
    ]
    for row in rows:
        values = {_key(name): value for name, value in row.metrics.items()}
        if any(name in values for name in names):
            shown = (percent(values.get(name), digits=2) for name in names)
            body.append((f"{row.method}, {row.backbone}", row.data, row.rule, *shown, row.source))
    return [
        Table(
            ("system", "training data", "rule", *map(metric_name, names), "source"),
            tuple(body),
            caption="Beside published values",
            note="Published values are as their sources print them, made by the rule that stands beside them; where it "
            "is not ours, compare with our numbers under the same --rule. None of the sources gives intervals.",
            text_columns=3,
        )
    ]


def _own(record: Record, names: Sequence[str]) -> list[str]:
    entries = {_key(name): entry for name, entry in record["metrics"].items()}
    return [percent(entries[name]["value"] if name in entries else None, digits=2) for name in names]


def _rule(record: Record) -> str:
    pooling = str(record.get("pooling", "")).replace(", F", "F")
    return "; ".join(part for part in (str(record["rule"]), pooling) if part)


def _key(metric: str) -> str:
    """One way to write a rate: `tar@far=0.0001` and `tar@far=1e-4` are the same metric."""
    name, _, rate = metric.partition("=")
    try:
        return f"{name}={float(rate):g}" if rate else metric
    except ValueError:
        return metric


def reference_table(group: Group, references: Sequence[Reference]) -> list[Block]:
    """Ours beside the values that the user gave, and the difference."""
    rows = []
    wanted = {_key(r.metric): r for r in references if r.protocol == group.protocol}
    for system in group.systems:
        for key, entry in system.record["metrics"].items():
            reference = wanted.get(_key(key))
            if reference is None or system.is_baseline:
                continue
            values = percent(entry["value"], digits=2), percent(reference.value, digits=2)
            rows.append(
                (metric_name(key), system.label, *values, difference(entry["value"], reference.value), reference.source)
            )
    if not rows:
        return []
    return [
        Table(
            ("metric", "system", "ours", "reference", "difference", "source"),
            tuple(rows),
            caption="Beside values to compare with",
            note="pp: percentage points; positive means that ours is higher.",
            text_columns=2,
        )
    ]
