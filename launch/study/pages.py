"""A summary as JSON, as Markdown, and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aroface.files import atomic_path
from launch.study.design import Study
from launch.study.summary import ALL_HEADS, METRICS, Difference, Row, Summary
from retrieval.report.style import COLOURS, GRID, INK, MUTED

__all__ = ["draw", "to_json", "to_markdown"]

_BUDGETS = {
    "epochs": "equal epochs: every arm sees each image equally often",
    "passes": "equal passes: an attack that costs passes trains for fewer epochs",
}


def to_json(summary: Summary) -> dict[str, Any]:
    """Every row with the values of its seeds."""
    rows = [
        {
            "budget": row.budget,
            "head": row.head,
            "alignment": row.alignment,
            "epochs": row.epochs,
            "values": {name: list(values) for name, values in row.values.items()},
            "differences": {
                reference: {name: difference.to_json() for name, difference in found.items()}
                for reference, found in row.differences.items()
            },
        }
        for row in summary.rows
    ]
    return {
        "finished_runs": summary.finished,
        "planned_runs": summary.planned,
        "unsupported": list(summary.unsupported),
        "rows": rows,
    }


def to_markdown(study: Study, summary: Summary, *, command: str, machine: Mapping[str, str]) -> str:
    """Tables of means and of differences."""
    lines = [
        f"# {study.config.title}",
        "",
        f"Command: `{command}`  ",
        f"Hardware: {', '.join(f'{key} {value}' for key, value in machine.items())}  ",
        f"Runs: {summary.finished} of {summary.planned} finished; seeds {', '.join(map(str, study.config.seeds))}; "
        f"recipe `{study.base.name}`.",
        "",
        "Low quality: mean Rank-1 over probes shrunk to "
        f"{', '.join(map(str, study.config.sizes_px))} px (LFW-LQ). Misaligned: mean Rank-1 over severities 0 to 1 of "
        f"FAE-1, {study.config.fae_probes} probes. Values are percent, mean ± standard deviation over seeds. "
        "Differences are percentage points, paired by seed, with the 95 % interval of Student's t; an interval that "
        f"holds 0 shows nothing. Rows named `{ALL_HEADS}` count every head and seed as a pair of its own, although two "
        "heads with one seed see the same data in the same order: their intervals are rather too narrow.",
    ]
    if summary.unsupported:
        names = ", ".join(METRICS[name] for name in summary.unsupported)
        lines += [
            "",
            f"\\* {names}: fewer than 30 false accepts stand behind the threshold of a run, so the value is not "
            "statistically supported, whatever its interval over seeds; no conclusion rests on it.",
        ]
    for budget in study.config.budgets:
        rows = [row for row in summary.rows if row.budget == budget]
        lines += ["", f"## {_BUDGETS[budget][0].upper()}{_BUDGETS[budget][1:]}", "", *_values_table(rows, summary)]
        for reference in study.config.references:
            lines += ["", f"Minus `{reference}`:", "", *_differences_table(rows, reference, summary)]
    return "\n".join(lines) + "\n"


def draw(study: Study, summary: Summary, path: Path) -> None:
    """Differences to the first reference, one panel per budget and metric, as PNG or SVG by the name."""
    from matplotlib.figure import Figure

    reference = study.config.references[0]
    names = [name for name in study.config.alignments if name != reference]
    budgets, heads = study.config.budgets, [*study.config.heads, ALL_HEADS][: len(study.config.heads) + 1]
    size = (2.9 * len(METRICS) + 0.8, (0.55 * len(names) + 1.1) * len(budgets) + 0.6)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(len(budgets), len(METRICS), squeeze=False, sharex=True, sharey=True)
    for line, budget in enumerate(budgets):
        for column, (metric, heading) in enumerate(METRICS.items()):
            axes = panels[line, column]
            _panel(axes, [r for r in summary.rows if r.budget == budget], names, heads, reference, metric)
            axes.set_title(f"{heading}\nequal {budget}", fontsize=10, color=INK)
    figure.supxlabel(f"difference to `{reference}` [percentage points], mean and 95 % interval", fontsize=10, color=INK)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(heads), frameon=False, labelcolor=INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130)


def _panel(axes: Any, rows: list[Row], names: list[str], heads: list[str], reference: str, metric: str) -> None:
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    offsets = (np.arange(len(heads)) - (len(heads) - 1) / 2) * 0.22
    for index, head in enumerate(heads):
        found = {row.alignment: row.differences.get(reference) for row in rows if row.head == head}
        shown = [(place, differences[metric]) for place, name in enumerate(names) if (differences := found.get(name))]
        means = np.array([100 * difference.mean for _, difference in shown])
        errors = np.array([[100 * (d.mean - d.low), 100 * (d.high - d.mean)] for _, d in shown]).reshape(-1, 2).T
        axes.errorbar(
            means,
            [place + offsets[index] for place, _ in shown],
            xerr=np.nan_to_num(errors),
            fmt="osD^v"[index % 5],
            color=INK if head == ALL_HEADS else COLOURS[index % len(COLOURS)],
            label=head,
            capsize=2,
            markersize=4,
            linewidth=1.2,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(colors=INK, labelsize=9)


def _headings(summary: Summary) -> str:
    return " | ".join(text + (" \\*" if name in summary.unsupported else "") for name, text in METRICS.items())


def _values_table(rows: list[Row], summary: Summary) -> list[str]:
    lines = [f"| head | alignment | epochs | {_headings(summary)} |", f"|---|---|---|{'---|' * len(METRICS)}"]
    for row in rows:
        if row.values:
            cells = (_mean_and_spread(row.values[name]) for name in METRICS)
            lines.append(f"| {row.head} | {row.alignment} | {row.epochs:g} | {' | '.join(cells)} |")
    return lines


def _differences_table(rows: list[Row], reference: str, summary: Summary) -> list[str]:
    lines = [f"| head | alignment | pairs | {_headings(summary)} |", f"|---|---|---|{'---|' * len(METRICS)}"]
    for row in rows:
        found = row.differences.get(reference)
        if found:
            pairs = next(iter(found.values())).pairs
            cells = (_with_interval(found[name]) for name in METRICS)
            lines.append(f"| {row.head} | {row.alignment} | {pairs} | {' | '.join(cells)} |")
    return lines


def _mean_and_spread(values: Any) -> str:
    if not len(values):
        return "-"
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def _with_interval(difference: Difference) -> str:
    text = f"{100 * difference.mean:+.2f}"
    if np.isnan(difference.low):
        return text
    is_clear = difference.low > 0 or difference.high < 0
    interval = f"[{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
    return f"**{text}** {interval}" if is_clear else f"{text} {interval}"
