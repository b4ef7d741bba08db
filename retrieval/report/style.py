"""How figures look: one style for all of them; matplotlib is imported inside.

Ink and series colours are those of `INK` and `COLOURS`, so that the page can replace them in the SVG by its own for a
dark background. Every line also has its own dash or marker, so that it can be told apart in grey.
"""

from typing import Any

__all__ = [
    "COLOURS",
    "GRID",
    "INK",
    "MUTED",
    "label",
    "line_style",
    "marked_style",
    "new_figure",
    "rate_axis",
]
__all__ += ["legend_above"]

#: Okabe and Ito's colours, which remain distinct for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, GRID = "#24292f", "#6e7781", "#d8dee4"
_DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (6, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SIZE = (6.0, 3.9)


def line_style(index: int) -> dict[str, Any]:
    """Colour and dash of line `index`; the first 36 differ in one of the two."""
    place, turn = index % len(COLOURS), index // len(COLOURS)
    return {"color": COLOURS[place], "linestyle": _DASHES[(place + turn) % len(_DASHES)], "linewidth": 1.9}


def marked_style(index: int) -> dict[str, Any]:
    """The same with a marker."""
    return line_style(index) | {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = _SIZE, **options: Any) -> tuple[Any, Any]:
    """A figure and its (rows, columns) axes."""
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


def label(axes: Any, x: str, y: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x, color=INK, fontsize=11)
    axes.set_ylabel(y, color=INK, fontsize=11)


def legend_above(figure: Any, axes: Any, *, columns: int = 3) -> None:
    """Name the lines of one axes above the whole figure, with a column less where a name is long."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = max(1, min(columns, 60 // max(longest + 8, 1), len(labels)))
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=3.2,
    )


def rate_axis(axes: Any, axis: str, lowest: float) -> None:
    """A logarithmic axis of rates from `lowest` to 1, in percent."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(lowest, 1)
    ruler = axes.xaxis if axis == "x" else axes.yaxis
    subs = (1.0,) if lowest < 1 / 300 else (1.0, 2.0, 5.0) if lowest < 1 / 4 else tuple(range(1, 10))
    ruler.set_major_locator(LogLocator(subs=subs, numticks=12))
    ruler.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
    ruler.set_minor_formatter(NullFormatter())
