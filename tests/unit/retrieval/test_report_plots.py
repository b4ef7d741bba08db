"""What figures must show whatever is drawn: logarithmic axes, and the range that the rule of 30 forbids to trust."""

from typing import Any

import pytest
from matplotlib.patches import Rectangle

from retrieval.report.plots import plot_calibration, plot_cmc, plot_error_tradeoff

RATES = [0.001, 0.01, 0.1, 1.0]


def spans(axes: Any) -> list[tuple[float, float, float, float]]:
    """(left, bottom, right, top) of the shaded ranges."""
    boxes = (patch.get_bbox() for patch in axes.patches if isinstance(patch, Rectangle))
    return [(box.x0, box.y0, box.x1, box.y1) for box in boxes]


def texts(axes: Any) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in axes.texts]


def test_the_error_tradeoff_is_logarithmic_and_shades_what_thirty_false_positives_do_not_support() -> None:
    curve = {"x": RATES, "y": [0.5, 0.3, 0.2, 0.0], "negatives": 1000}
    figure = plot_error_tradeoff({"one": curve}, x="FMR", y="FNMR", negatives_are="impostor pairs")
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    ((left, _, right, _),) = spans(axes)
    assert (left, right) == pytest.approx((1 / 1000, 30 / 1000))
    assert any(list(line.get_xdata()) == pytest.approx([0.03, 0.03]) for line in axes.lines)
    assert texts(axes) == ["fewer than 30 false positives"]


def test_the_limit_is_that_of_the_largest_set_and_absent_where_every_rate_is_supported() -> None:
    curves = {name: {"x": RATES, "y": [0.5, 0.3, 0.2, 0.1], "negatives": n} for name, n in (("a", 100), ("b", 10**9))}
    axes = plot_error_tradeoff(curves, x="FMR", y="FNMR", negatives_are="pairs").axes[0]
    assert not spans(axes)  # the axis ends at 1e-6, where 1,000 false positives stand behind a rate
    assert not texts(axes)
    axes = plot_error_tradeoff({"a": curves["a"]}, x="FMR", y="FNMR", negatives_are="pairs").axes[0]
    assert spans(axes)[0][2] == pytest.approx(0.3)


def test_calibration_is_logarithmic_in_the_rate_and_shades_the_same_range() -> None:
    curve = {"threshold": [0.9, 0.6, 0.3, None], "x": RATES, "negatives": 1000}
    axes = plot_calibration({"one": curve}, rate="FMR", negatives_are="impostor pairs").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    ((_, bottom, _, top),) = spans(axes)
    assert (bottom, top) == pytest.approx((1 / 1000, 30 / 1000))
    assert texts(axes) == ["fewer than 30 false positives"]
    assert list(axes.lines[0].get_xdata()) == [0.9, 0.6, 0.3]  # no point where everything is accepted


def test_the_cmc_has_its_misses_on_a_logarithmic_axis() -> None:
    found, missed = plot_cmc({"one": [0.5, 0.75, 0.9, 1.0]}).axes
    assert (found.get_xscale(), found.get_yscale()) == ("log", "linear")
    assert (missed.get_xscale(), missed.get_yscale()) == ("log", "log")
    assert list(missed.lines[0].get_ydata()) == pytest.approx([0.5, 0.25, 0.1])
