"""The report as a whole: what stands where, and the files it is written to."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aroface.errors import DataError
from aroface.files import atomic_path, new_directory, write_json
from retrieval.report.document import (
    Block,
    Document,
    KeyNumber,
    KeyNumbers,
    Listing,
    Notice,
    Paragraph,
    Picture,
    Plot,
    Section,
    Table,
)
from retrieval.report.groups import Group, group_results, model_of
from retrieval.report.inputs import ReportInputs, Run
from retrieval.report.plots import plot_training
from retrieval.report.sections import result_sections
from retrieval.report.to_html import render_html
from retrieval.report.to_markdown import render_markdown
from retrieval.report.wording import condition_name, interval, metric_name, percent

__all__ = ["build_document", "write_report"]

_PNG_DPI = 160
_MOST_KEY_NUMBERS = 4


def write_report(inputs: ReportInputs, out: Path, *, title: str = "Face recognition report") -> list[Path]:
    """Write report.html, report.md, results.json (all records as given) and plots/ into a new folder.

    Args:
        inputs: from `read_inputs`.
        out: created; must be empty where it exists.
        title: heading of the page.

    Returns:
        The two pages.

    Raises:
        DataError: `out` holds something, or there is no result.
    """
    if not inputs.results:
        raise DataError("A report needs at least one result of `aroface evaluate`; none was given.")
    new_directory(out, what="Report folder")
    document = build_document(inputs, title=title)
    drawings = _write_plots(document, out / "plots")
    pages = {"report.md": render_markdown(document), "report.html": render_html(document, drawings)}
    for name, text in pages.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # names of files may be no Unicode
    write_json(out / "results.json", {"title": title, "results": [dict(record) for record in inputs.results]})
    return [out / "report.html", out / "report.md"]


def build_document(inputs: ReportInputs, *, title: str) -> Document:
    """Arrange everything that the inputs hold."""
    sections = [_headline(inputs), *result_sections(inputs)]
    if inputs.run is not None and inputs.run.metrics:
        sections.append(_training(inputs.run))
    if inputs.grid is not None:
        sections.append(_attack(inputs.grid))
    sections.append(_what_was_run(inputs))
    return Document(title, _subtitle(inputs), tuple(section for section in sections if section.blocks))


def _subtitle(inputs: ReportInputs) -> str:
    versions = inputs.stages.get("versions", {})
    version = versions.get("aroface") or (inputs.run.environment.get("versions", {}) if inputs.run else {}).get(
        "aroface"
    )
    models = sorted({found for record in inputs.results if (found := model_of(record))})
    parts = [f"model {', '.join(models)}" if models else "", f"aroface {version}" if version else ""]
    return " · ".join(part for part in parts if part)


def _headline(inputs: ReportInputs) -> Section:
    groups = [g for g in group_results(inputs.results, inputs.names) if g.protocol != "compare"]
    if not groups:
        return Section("At a glance", ())
    warnings = tuple(Notice(text) for record in inputs.results for text in record.get("warnings", ()))
    lead = next((group for group in groups if _has_sizes(group)), None)
    numbers = _leading_numbers(lead) if lead is not None else _plain_numbers(groups)
    blocks: list[Block] = [KeyNumbers(tuple(numbers))] if numbers else []
    first = lead or groups[0]
    others = [system.label for system in first.systems[1:]]
    if others:
        blocks.append(
            Paragraph(
                f"The large number is that of “{first.systems[0].label}”, with its 95 % confidence interval; "
                f"beneath it stand {_and(others)}."
            )
        )
    if warnings:
        blocks += [Paragraph("Read with care:"), *dict.fromkeys(warnings)]
    return Section("At a glance", tuple(blocks))


def _has_sizes(group: Group) -> bool:
    return any(key.startswith("rank_1@") for key in group.first["metrics"])


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _leading_numbers(group: Group) -> list[KeyNumber]:
    """Clean, the middle and the smallest size, and pair accuracy."""
    record = group.first
    names = [key.removeprefix("rank_1@") for key in record["metrics"] if key.startswith("rank_1@")]
    chosen = list(dict.fromkeys([*names[:1], *names[len(names) // 2 : len(names) // 2 + 1], *names[-1:]]))
    numbers = []
    for key in [*(f"rank_1@{name}" for name in chosen), "accuracy"]:
        if (entry := record["metrics"].get(key)) is None or entry["value"] is None:
            continue
        name = key.removeprefix("rank_1@")
        label = metric_name(key) if key == "accuracy" else f"Rank-1, {_probes(name)}"
        numbers.append(KeyNumber(label, percent(entry["value"]), _detail(group, key)))
    return numbers


def _probes(condition: str) -> str:
    return f"{condition_name(condition)} {'faces' if condition.endswith('px') else 'probes'}"


def _detail(group: Group, key: str) -> str:
    entry = group.first["metrics"][key]
    lines = [interval(entry)] if entry.get("ci95") else []
    for system in group.systems[1:]:
        if (other := system.record["metrics"].get(key)) is not None:
            lines.append(f"{system.label} {percent(other['value'])}")
    return "\n".join(lines)


def _plain_numbers(groups: Sequence[Group]) -> list[KeyNumber]:
    """The first metrics of every group, a few of each."""
    found = []
    most = max(1, _MOST_KEY_NUMBERS // len(groups))
    for group in groups:
        valued = [(key, entry) for key, entry in group.first["metrics"].items() if entry["value"] is not None]
        found += [KeyNumber(metric_name(key), percent(e["value"]), _detail(group, key)) for key, e in valued[:most]]
    return found[:_MOST_KEY_NUMBERS]


def _training(run: Run) -> Section:
    last = run.metrics[-1]
    speeds = sorted(line["img_per_s"] for line in run.metrics)
    rows = (
        ("optimiser steps", f"{last['step']:,}"),
        ("images seen", f"{last['samples']:,}"),
        ("final loss", f"{last['loss']:.3f}"),
        ("images per second, median", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("waiting for data, last line", f"{1000 * last['data_wait_s']:.1f} ms per step"),
        ("alignment attack, last line", f"{1000 * last['attack_s']:.1f} ms per step"),
        ("peak memory", f"{last['memory_gib']:.2f} GiB"),
    )
    return Section(
        "Training",
        (
            Plot(
                "training",
                plot_training(run.metrics),
                alt=f"Training loss falls to {last['loss']:.2f} after {last['samples']:,} images.",
                caption="Loss (with margin, on augmented and attacked images) and learning rate against images seen.",
            ),
            Table(("run", run.name), rows, note="Each line of metrics.jsonl is a mean over the steps since the last."),
        ),
    )


def _attack(png: bytes) -> Section:
    caption = (
        "Training images as they are, under a random misalignment, and under the one that the attack found, with the "
        "loss of each. They stay in this folder: look at the licence of the data before passing the page on."
    )
    picture = Picture(
        "attack", png, alt="Grid of clean, randomly misaligned and attacked training images.", caption=caption
    )
    return Section("What the alignment attack does", (picture,))


def _what_was_run(inputs: ReportInputs) -> Section:
    blocks: list[Block] = []
    stages = inputs.stages.get("stages", [])
    if stages:
        rows = [(s["name"], f"{s['seconds']:.1f} s", _gib(s.get("peak_memory_gib"))) for s in stages]
        rows.append(("together", f"{sum(s['seconds'] for s in stages):.1f} s", _gib(_peak(stages))))
        blocks.append(
            Table(("stage", "wall time", "peak memory"), tuple(rows), note="This report itself is not in the sum.")
        )
        commands = "\n".join(str(stage["command"]) for stage in stages)
        blocks.append(Listing("Commands, each of which can be run by itself", commands))
    versions = inputs.stages.get("versions") or (inputs.run.environment.get("versions", {}) if inputs.run else {})
    hardware = inputs.stages.get("hardware", {})
    facts = [(name, str(value)) for name, value in {**hardware, **versions}.items()]
    if inputs.run and inputs.run.environment.get("git_commit"):
        facts.append(("git commit of the training", str(inputs.run.environment["git_commit"])))
    if facts:
        blocks.append(Table(("machine and software", ""), tuple(facts), text_columns=2))
    if inputs.run and inputs.run.config:
        blocks.append(Listing("Training configuration", inputs.run.config.rstrip()))
    return Section("What was run", tuple(blocks))


def _peak(stages: list[Mapping[str, Any]]) -> float | None:
    return max((s["peak_memory_gib"] for s in stages if s.get("peak_memory_gib") is not None), default=None)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} GiB"


def _write_plots(document: Document, folder: Path) -> dict[str, str]:
    """Write NAME.png and NAME.svg; SVG text by name, for the page."""
    drawings = {}
    for block in (block for section in document.sections for block in section.blocks):
        if isinstance(block, Picture):
            with atomic_path(folder / f"{block.name}.png") as temporary:
                temporary.write_bytes(block.png)
        if isinstance(block, Plot):
            svg = _svg(block.figure)
            drawings[block.name] = svg
            with atomic_path(folder / f"{block.name}.svg") as temporary:
                temporary.write_text(svg, encoding="utf-8")
            with atomic_path(folder / f"{block.name}.png") as temporary:
                block.figure.savefig(temporary, format="png", dpi=_PNG_DPI)
    return drawings


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "aroface", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
