"""The figures of searches, pairs and training. Every function draws one figure and returns it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrieval.metrics.rules import MIN_SUPPORTED
from retrieval.report.style import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    label,
    legend_above,
    line_style,
    marked_style,
    new_figure,
    rate_axis,
)

__all__ = [
    "plot_bars",
    "plot_calibration",
    "plot_cmc",
    "plot_discard",
    "plot_error_tradeoff",
    "plot_histograms",
    "plot_training",
]

_LOWEST_RATE = 1e-6
_MOST_DISCARDED = 0.5


def plot_cmc(curves: Mapping[str, Sequence[float]], *, max_rank: int = 50) -> Any:
    """Found within rank k, and missed (FNIR) on a logarithmic axis, against k, one line per label."""
    figure, panels = new_figure(1, 2, (7.4, 3.7))
    found, missed = panels[0]
    longest, lowest, fewest = 1, 100.0, 1.0
    for index, (name, values) in enumerate(curves.items()):
        shown = np.asarray(values[:max_rank], float)
        ranks = np.arange(1, len(shown) + 1)
        longest, lowest = max(longest, len(shown)), min(lowest, float(100 * shown.min()))
        found.plot(ranks, 100 * shown, label=name, **line_style(index))
        errors = 1 - shown
        if (errors > 0).any():
            fewest = min(fewest, float(errors[errors > 0].min()))
            missed.plot(ranks[errors > 0], errors[errors > 0], **line_style(index))
    for axes in (found, missed):
        axes.set_xscale("log")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= longest]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    found.set_ylim(10 * math.floor(lowest / 20) * (lowest > 50), 101)
    rate_axis(missed, "y", max(fewest / 1.3, 1e-4))
    label(found, "rank k", "found within rank k [%]")
    label(missed, "rank k", "FNIR (not within rank k)")
    legend_above(figure, found)
    return figure


def plot_error_tradeoff(curves: Mapping[str, Mapping[str, Any]], *, x: str, y: str, negatives_are: str) -> Any:
    """Two error rates against each other on logarithmic axes, with the limit of the rule of 30.

    Args:
        curves: label -> {x, y: rates in [0, 1], negatives: comparisons behind the x axis}.
        x: name of the rate on the x axis, such as FPIR.
        y: name of the rate on the y axis.
        negatives_are: what the x axis counts, such as `non-mated searches`.
    """
    figure, panels = new_figure()
    axes = panels[0, 0]
    negatives = max(int(curve["negatives"]) for curve in curves.values())
    lowest = 1.0
    for index, (name, curve) in enumerate(curves.items()):
        rates, errors = np.asarray(curve["x"], float), np.asarray(curve["y"], float)
        is_shown = (rates > 0) & (errors > 0)
        if is_shown.any():
            lowest = min(lowest, float(errors[is_shown].min()))
        axes.plot(rates[is_shown], errors[is_shown], label=name, drawstyle="steps-post", **line_style(index))
    left = max(1 / negatives, _LOWEST_RATE)
    for axis, bottom in (("x", left), ("y", max(lowest / 1.3, 1e-5))):
        rate_axis(axes, axis, bottom)
    _mark_limit(axes, left, min(MIN_SUPPORTED / negatives, 1.0))
    label(axes, f"{x} ({negatives:,} {negatives_are})", y)
    legend_above(figure, axes)
    return figure


def _mark_limit(axes: Any, left: float, limit: float) -> None:
    """Shade the rates that fewer than 30 false positives stand behind."""
    if limit <= left:
        return
    axes.axvspan(left, limit, color=GRID, alpha=0.45, linewidth=0)
    axes.axvline(limit, color=MUTED, linewidth=1)
    axes.annotate(
        f"fewer than {MIN_SUPPORTED}\nfalse positives",
        (math.sqrt(left * limit), 0.02),
        xycoords=("data", "axes fraction"),
        ha="center",
        fontsize=9,
        color=INK,
    )


def plot_calibration(curves: Mapping[str, Mapping[str, Any]], *, rate: str, negatives_are: str) -> Any:
    """A false-positive rate, on a logarithmic axis, against the threshold, with the limit of the rule of 30.

    Args:
        curves: label -> {threshold: scores, None accepts all; x: rates in [0, 1]; negatives: comparisons behind them}.
        rate: its name, such as FMR.
        negatives_are: what is counted.
    """
    figure, panels = new_figure()
    axes = panels[0, 0]
    negatives = max(int(curve["negatives"]) for curve in curves.values())
    for index, (name, curve) in enumerate(curves.items()):
        known = [(t, x) for t, x in zip(curve["threshold"], curve["x"], strict=True) if t is not None and x > 0]
        thresholds, rates = np.array(known).reshape(-1, 2).T
        axes.plot(thresholds, rates, label=name, **line_style(index))
    bottom = max(1 / negatives, _LOWEST_RATE)
    rate_axis(axes, "y", bottom)
    limit = min(MIN_SUPPORTED / negatives, 1.0)
    if limit > bottom:
        axes.axhspan(bottom, limit, color=GRID, alpha=0.45, linewidth=0)
        axes.axhline(limit, color=MUTED, linewidth=1)
        text = f"fewer than {MIN_SUPPORTED} false positives"
        place = (0.02, math.sqrt(bottom * limit))
        axes.annotate(text, place, xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
    label(axes, "threshold on the score", f"{rate} ({negatives:,} {negatives_are})")
    legend_above(figure, axes)
    return figure


def plot_histograms(scores: Mapping[str, Mapping[str, Any]], *, kinds: tuple[str, str], unit: str) -> Any:
    """Scores that should be accepted and scores that should not, each as shares of its own number; a panel per label.

    Args:
        scores: label -> {edges, genuine, impostor: counts per bin}.
        kinds: what the two are called.
        unit: what is counted, in the plural.
    """
    columns = min(2, len(scores))
    rows = math.ceil(len(scores) / columns)
    size = (6.0, 3.9) if len(scores) == 1 else (7.4, 2.9 * rows + 0.4)
    figure, panels = new_figure(rows, columns, size, sharex=True, sharey=True)
    highest = 0.0
    for axes, (name, record) in zip(panels.flat, scores.items(), strict=False):
        edges = np.asarray(record["edges"])
        for index, (key, kind) in enumerate(zip(("genuine", "impostor"), kinds, strict=True)):
            counts = np.asarray(record[key], float)
            shares = 100 * counts / max(counts.sum(), 1)
            axes.stairs(shares, edges, fill=True, alpha=0.25, color=COLOURS[index])
            axes.stairs(shares, edges, label=kind, **line_style(index))
            highest = max(highest, float(shares.max()))
        sizes = (f"{int(sum(record[key])):,} {kind}" for key, kind in zip(("genuine", "impostor"), kinds, strict=True))
        title = "" if len(scores) == 1 else f"{name}: "
        axes.set_title(f"{title}{', '.join(sizes)} {unit}", fontsize=9, color=INK, loc="left")
        axes.set_ylim(0, 1.08 * highest)
    for axes in panels.flat[len(scores) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(scores) - columns) : len(scores)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("score", color=INK, fontsize=11)
    figure.supylabel("share per bin [%]", color=INK, fontsize=11)
    legend_above(figure, panels[0, 0])
    return figure


def plot_discard(curves: Mapping[str, Mapping[str, Any]]) -> Any:
    """FNMR at a fixed threshold against the share of comparisons of low quality that is discarded.

    Args:
        curves: label -> {discarded, fnmr}.
    """
    figure, panels = new_figure()
    axes = panels[0, 0]
    highest = 0.0
    for index, (name, curve) in enumerate(curves.items()):
        errors = 100 * np.asarray(curve["fnmr"], float)
        highest = max(highest, float(errors.max(initial=0)))
        axes.plot(100 * np.asarray(curve["discarded"]), errors, label=name, drawstyle="steps-post", **line_style(index))
        start = float(errors[0])
        axes.plot([0, start], [start, 0], color=COLOURS[index % len(COLOURS)], linewidth=0.9, alpha=0.6)
    axes.set_xlim(0, 100 * _MOST_DISCARDED)
    axes.set_ylim(0, 1.08 * highest if highest else 1)
    label(axes, "comparisons discarded, lowest quality first [%]", "FNMR of the rest [%]")
    legend_above(figure, axes)
    return figure


def plot_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[Mapping[str, Any] | None]], *, x: str, y: str
) -> Any:
    """One value with its 95 % interval per group and series.

    Args:
        groups: names along the x axis.
        series: label -> per group an entry {value, ci95} as result records hold them, None where absent.
        x: label of the x axis.
        y: label of the y axis; values are drawn in percent.
    """
    figure, panels = new_figure()
    axes = panels[0, 0]
    highest = 0.0
    spread = min(0.14, 0.7 / max(len(series), 1))
    offsets = (np.arange(len(series)) - (len(series) - 1) / 2) * spread
    for index, (name, entries) in enumerate(series.items()):
        found = [(place, entry) for place, entry in enumerate(entries) if entry and entry["value"] is not None]
        values = np.array([100 * entry["value"] for _, entry in found])
        bounds = 100 * np.array([entry.get("ci95") or [entry["value"]] * 2 for _, entry in found]).reshape(-1, 2)
        highest = max(highest, float(bounds.max(initial=0)))
        axes.errorbar(
            [place + offsets[index] for place, _ in found],
            values,
            yerr=np.clip(np.stack([values - bounds[:, 0], bounds[:, 1] - values]), 0, None),
            label=name,
            capsize=3,
            elinewidth=1.4,
            **marked_style(index) | {"linewidth": 1.1},
        )
    tilted = sum(map(len, groups)) > 60
    axes.set_xticks(range(len(groups)), groups, rotation=30 if tilted else 0, ha="right" if tilted else "center")
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 102 if highest > 40 else max(1.15 * highest, 1))
    label(axes, x, y)
    legend_above(figure, axes)
    return figure


def plot_training(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Loss and, in a panel of its own beneath it, the learning rate, against images seen."""
    figure, panels = new_figure(2, 1, (6.0, 4.3), sharex=True, height_ratios=[2.4, 1])
    seen = [line["samples"] / 1000 for line in lines]
    panels[0, 0].plot(seen, [line["loss"] for line in lines], **line_style(0))
    panels[1, 0].plot(seen, [line["lr"] for line in lines], **line_style(1))
    label(panels[0, 0], "", "training loss [nats]")
    label(panels[1, 0], "images seen [thousands]", "learning rate")
    for axes in panels.flat:
        axes.set_ylim(bottom=0)
    return figure
