"""The figures of a report. Every function draws one figure and returns it; matplotlib is imported inside.

Ink and series colours are those of `INK` and `COLOURS`, so that the page can replace them in the SVG by its own for a
dark background. Every line also has its own dash or marker, so that it can be told apart in grey.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrieval.metrics.rules import MIN_SUPPORTED

__all__ = [
    "COLOURS",
    "GRID",
    "INK",
    "MUTED",
    "plot_bars",
    "plot_cmc",
    "plot_error_tradeoff",
    "plot_histogram",
    "plot_misalignment",
    "plot_training",
]

#: Okabe and Ito's colours, which remain distinct for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, GRID = "#24292f", "#6e7781", "#d8dee4"
_DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (6, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SIZE = (6.0, 3.9)
_LOWEST_RATE = 1e-6


def _style(index: int) -> dict[str, Any]:
    place = index % len(COLOURS)
    return {"color": COLOURS[place], "linestyle": _DASHES[place], "linewidth": 1.9}


def _marked(index: int) -> dict[str, Any]:
    return _style(index) | {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = _SIZE, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.set_facecolor("none")
        axes.grid(True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", colors=INK, labelsize=10)
        for side, spine in axes.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return figure, panels


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=11)
    axes.set_ylabel(y, color=INK, fontsize=11)


def _legend(axes: Any, **options: Any) -> None:
    legend = axes.legend(frameon=False, fontsize=10, labelcolor=INK, handlelength=3.2, **options)
    legend.set_in_layout(True)


def plot_cmc(curves: Mapping[str, Sequence[float]], *, max_rank: int = 50) -> Any:
    """Share of mated probes found within rank k, against k on a logarithmic axis, one line per label."""
    figure, panels = _figure()
    axes = panels[0, 0]
    longest, lowest = 1, 100.0
    for index, (label, values) in enumerate(curves.items()):
        shown = 100 * np.asarray(values[:max_rank], float)
        longest, lowest = max(longest, len(shown)), min(lowest, float(shown.min()))
        axes.plot(np.arange(1, len(shown) + 1), shown, label=label, **_style(index))
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= longest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(10 * math.floor(lowest / 20) * (lowest > 50), 101)
    _label(axes, "rank k", "mated probes found within rank k [%]")
    _legend(axes)
    return figure


def plot_error_tradeoff(curves: Mapping[str, Mapping[str, Any]], *, x: str, y: str, negatives_are: str) -> Any:
    """Two error rates against each other on logarithmic axes, with the limit of the rule of 30.

    Args:
        curves: label -> {x, y: rates in [0, 1], negatives: comparisons behind the x axis}.
        x: name of the rate on the x axis, such as FPIR.
        y: name of the rate on the y axis.
        negatives_are: what the x axis counts, such as `non-mated searches`.
    """
    figure, panels = _figure()
    axes = panels[0, 0]
    negatives = max(int(curve["negatives"]) for curve in curves.values())
    lowest = 1.0
    for index, (label, curve) in enumerate(curves.items()):
        rates, errors = np.asarray(curve["x"], float), np.asarray(curve["y"], float)
        is_shown = (rates > 0) & (errors > 0)
        if is_shown.any():
            lowest = min(lowest, float(errors[is_shown].min()))
            axes.plot(rates[is_shown], errors[is_shown], label=label, drawstyle="steps-post", **_style(index))
    left = max(1 / negatives, _LOWEST_RATE)
    limit = min(MIN_SUPPORTED / negatives, 1.0)
    for axis, bottom in (("x", left), ("y", lowest / 1.3)):
        _rate_axis(axes, axis, bottom)
    if limit > left:
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
    _label(axes, f"{x} ({negatives:,} {negatives_are})", y)
    axes.legend(
        frameon=False, fontsize=10, labelcolor=INK, handlelength=3.2, loc="lower left", bbox_to_anchor=(0, 1), ncols=3
    )
    return figure


def _rate_axis(axes: Any, axis: str, lowest: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(lowest, 1)
    ruler = axes.xaxis if axis == "x" else axes.yaxis
    wide = lowest < 1 / 300
    ruler.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ruler.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
    ruler.set_minor_formatter(NullFormatter())


def plot_histogram(scores: Mapping[str, Any]) -> Any:
    """Genuine and impostor scores, each as shares of its own number."""
    figure, panels = _figure()
    axes = panels[0, 0]
    edges = np.asarray(scores["edges"])
    for index, kind in enumerate(("genuine", "impostor")):
        counts = np.asarray(scores[kind], float)
        shares = 100 * counts / max(counts.sum(), 1)
        axes.stairs(shares, edges, fill=True, alpha=0.25, color=COLOURS[index])
        style = _style(index)
        axes.stairs(shares, edges, label=f"{kind} ({int(counts.sum()):,} pairs)", **style)
    _label(axes, "cosine of the two embeddings", "share of pairs per bin [%]")
    axes.set_ylim(bottom=0)
    _legend(axes)
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
    figure, panels = _figure()
    axes = panels[0, 0]
    offsets = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.14
    for index, (label, entries) in enumerate(series.items()):
        found = [(place, entry) for place, entry in enumerate(entries) if entry and entry["value"] is not None]
        values = np.array([100 * entry["value"] for _, entry in found])
        bounds = 100 * np.array([entry.get("ci95") or [entry["value"]] * 2 for _, entry in found]).reshape(-1, 2)
        axes.errorbar(
            [place + offsets[index] for place, _ in found],
            values,
            yerr=np.clip(np.stack([values - bounds[:, 0], bounds[:, 1] - values]), 0, None),
            label=label,
            capsize=3,
            elinewidth=1.4,
            **_marked(index) | {"linewidth": 1.1},
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 100)
    _label(axes, x, y)
    _legend(axes)
    return figure


def plot_misalignment(sweeps: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], *, y: str) -> Any:
    """One panel per sweep: metrics in percent against the amount of misalignment, with +- one sd over trials.

    Args:
        sweeps: {name, unit, points: [{severity, metrics: {metric: mean}, sd: {metric: sd or None}}]}.
        metrics: key of the metric -> its label.
        y: label of the y axes.
    """
    columns = min(2, len(sweeps))
    rows = math.ceil(len(sweeps) / columns)
    figure, panels = _figure(rows, columns, (6.4, 2.7 * rows + 0.4), sharey=True)
    for axes, sweep in zip(panels.flat, sweeps, strict=False):
        points = sorted(sweep["points"], key=lambda point: float(point["severity"]))
        for index, (key, label) in enumerate(metrics.items()):
            means = 100 * np.array([point["metrics"][key] for point in points])
            spread = 100 * np.array([point["sd"][key] or 0.0 for point in points])
            severities = [point["severity"] for point in points]
            axes.errorbar(severities, means, yerr=spread if spread.any() else None, label=label, **_marked(index))
        unit = f" [{sweep['unit']}]" if sweep["unit"] else ""
        _label(axes, f"{sweep['name']}{unit}", "")
        axes.set_ylim(0, 102)
    for axes in panels.flat[len(sweeps) :]:
        axes.set_visible(False)
    figure.supylabel(y, color=INK, fontsize=11)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=10, labelcolor=INK, handlelength=3
    )
    return figure


def plot_training(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Loss and, in a panel of its own beneath it, the learning rate, against images seen."""
    figure, panels = _figure(2, 1, (6.0, 4.3), sharex=True, height_ratios=[2.4, 1])
    seen = [line["samples"] / 1000 for line in lines]
    panels[0, 0].plot(seen, [line["loss"] for line in lines], **_style(0))
    panels[1, 0].plot(seen, [line["lr"] for line in lines], **_style(1))
    _label(panels[0, 0], "", "training loss [nats]")
    _label(panels[1, 0], "images seen [thousands]", "learning rate")
    for axes in panels.flat:
        axes.set_ylim(bottom=0)
    return figure
