"""The report as a whole: what stands where, and the files it is written to."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aroface.errors import DataError
from aroface.files import atomic_path, new_directory
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
from retrieval.report.inputs import ReportInputs, Run
from retrieval.report.plots import plot_training
from retrieval.report.sections import result_sections
from retrieval.report.to_html import render_html
from retrieval.report.to_markdown import render_markdown
from retrieval.report.wording import condition_name, interval, metric_name, percent, system_name

__all__ = ["build_document", "write_report"]

_PNG_DPI = 160
_MOST_KEY_NUMBERS = 4


def write_report(inputs: ReportInputs, out: Path, *, title: str = "Face recognition report") -> list[Path]:
    """Write report.html, report.md and plots/ into a new folder.

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
            temporary.write_text(text, encoding="utf-8")
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
    models = sorted({str(found) for record in inputs.results if (found := _model_id(record))})
    parts = [f"model {', '.join(models)}" if models else "", f"aroface {version}" if version else ""]
    return " · ".join(part for part in parts if part)


def _model_id(record: Mapping[str, Any]) -> Any:
    model = record.get("model") or record.get("inputs", {}).get("model") or {}
    return model.get("model_id") or model.get("model")


def _headline(inputs: ReportInputs) -> Section:
    warnings = tuple(Notice(text) for record in inputs.results for text in record.get("warnings", ()))
    compared = next((record for record in inputs.results if "conditions" in record), None)
    numbers = _compared_numbers(compared) if compared else _plain_numbers(inputs)
    blocks: list[Block] = [KeyNumbers(tuple(numbers))] if numbers else []
    if compared and compared.get("baselines"):
        blocks.append(
            Paragraph(
                "Beside each number stand its 95 % confidence interval and what the same task gives "
                f"{_and([_BASELINES.get(key, key) for key in compared['baselines']])}."
            )
        )
    if warnings:
        blocks += [Paragraph("Read with care:"), *dict.fromkeys(warnings)]
    return Section("At a glance", tuple(blocks))


_BASELINES = {
    "untrained": "to the same network with fresh weights",
    "pixels": "to a comparison of the pixels themselves",
}


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _compared_numbers(record: Mapping[str, Any]) -> list[KeyNumber]:
    """Clean, the middle and the smallest size, and pair accuracy."""
    names = [key.removeprefix("rank_1@") for key in record["metrics"] if key.startswith("rank_1@")]
    chosen = list(dict.fromkeys([*names[:1], *names[len(names) // 2 : len(names) // 2 + 1], *names[-1:]]))
    numbers = []
    for key in [*(f"rank_1@{name}" for name in chosen), "accuracy"]:
        if (entry := record["metrics"].get(key)) is None or entry["value"] is None:
            continue
        name = key.removeprefix("rank_1@")
        label = metric_name(key) if key == "accuracy" else f"Rank-1, {_probes(name)}"
        numbers.append(KeyNumber(label, percent(entry["value"]), _detail(record, key)))
    return numbers


def _probes(condition: str) -> str:
    return f"{condition_name(condition)} {'faces' if condition.endswith('px') else 'probes'}"


def _detail(record: Mapping[str, Any], key: str) -> str:
    entry = record["metrics"][key]
    lines = [interval(entry)] if entry.get("ci95") else []
    for name, other in record.get("baselines", {}).items():
        if (baseline := other["metrics"].get(key)) is not None:
            lines.append(f"{system_name(name)} {percent(baseline['value'])}")
    return "\n".join(lines)


def _plain_numbers(inputs: ReportInputs) -> list[KeyNumber]:
    """The first metrics of the results, a few of each."""
    found = []
    most = max(1, _MOST_KEY_NUMBERS // len(inputs.results))
    for record in inputs.results:
        valued = [(key, entry) for key, entry in record["metrics"].items() if entry["value"] is not None]
        found += [KeyNumber(metric_name(key), percent(entry["value"]), interval(entry)) for key, entry in valued[:most]]
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
