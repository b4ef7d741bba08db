"""The figures of FAE-1: metrics against the amount of misalignment, several models in one figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrieval.report.style import COLOURS, INK, label, legend_above, marked_style, new_figure, rate_axis

__all__ = ["plot_change_bars", "plot_misalignment"]

_DASHED = (0, (4, 2))
_FOOT = 1e-4


def plot_misalignment(
    systems: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Mapping[str, str], *, y: str, is_log: bool = False
) -> Any:
    """One panel per sweep: metrics in percent against the amount of misalignment, with +- one sd over trials.

    A system has a colour; of two metrics the second is dashed. With one system every metric has its own colour.

    Args:
        systems: label -> sweeps {name, unit, points: [{severity, metrics: {metric: mean}, sd: {metric: sd or None}}]}.
        metrics: key of the metric -> its label.
        y: label of the y axes.
        is_log: rates of very different size, on a logarithmic axis; zeros are drawn at its foot.
    """
    sweeps = next(iter(systems.values()))
    columns = min(2, len(sweeps))
    rows = math.ceil(len(sweeps) / columns)
    figure, panels = new_figure(rows, columns, (7.0, 2.6 * rows + 0.5), sharey=True)
    highest, lowest = 0.0, 1.0
    for number, axes in enumerate(panels.flat[: len(sweeps)]):
        for place, (system, own) in enumerate(systems.items()):
            points = sorted(own[number]["points"], key=lambda point: float(point["severity"]))
            for turn, (key, name) in enumerate(metrics.items()):
                if any(key not in point["metrics"] for point in points):
                    continue
                means = 100 * np.array([point["metrics"][key] for point in points])
                spread = 100 * np.array([point["sd"][key] or 0.0 for point in points])
                highest = max(highest, float(means.max()))
                lowest = min([lowest, *(means[means > 0] / 100).tolist()])
                if is_log:
                    means = np.maximum(means / 100, _FOOT)
                alone = len(systems) == 1
                style = marked_style(turn if alone else place)
                if not alone and turn:
                    style |= {"linestyle": _DASHED, "markerfacecolor": "none"}
                axes.errorbar(
                    [point["severity"] for point in points],
                    means,
                    yerr=spread if spread.any() and not is_log else None,
                    label=name if alone else f"{system}: {name}" if len(metrics) > 1 else system,
                    capsize=2,
                    elinewidth=1,
                    **style,
                )
        sweep = sweeps[number]
        label(axes, f"{sweep['name']} [{sweep['unit']}]" if sweep["unit"] else sweep["name"], "")
    for axes in panels.flat[: len(sweeps)]:
        if is_log:
            rate_axis(axes, "y", max(lowest / 1.5, _FOOT))
        else:
            axes.set_ylim(0, 102 if highest > 40 else max(1.15 * highest, 1))
    for axes in panels.flat[len(sweeps) :]:
        axes.set_visible(False)
    figure.supylabel(y, color=INK, fontsize=11)
    legend_above(figure, panels[0, 0], columns=2)
    return figure


def plot_change_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], *, y: str) -> Any:
    """Change to the aligned state in percentage points, one bar per group and system.

    Args:
        groups: names along the x axis, such as the worst level of each sweep.
        series: label -> change per group, as shares.
        y: label of the y axis.
    """
    figure, panels = new_figure(size=(6.4, 3.6))
    axes = panels[0, 0]
    width = 0.8 / max(len(series), 1)
    hatches = ("", "//", "..", "xx", "\\\\", "++")
    for index, (name, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        colour = COLOURS[index % len(COLOURS)]
        bars = 100 * np.asarray(values)
        axes.bar(places, bars, 0.9 * width, label=name, color=colour, hatch=hatches[index % 6], edgecolor=INK, lw=0.4)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    label(axes, "", y)
    legend_above(figure, axes)
    return figure
