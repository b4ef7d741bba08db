"""Margin functions against the formulas of the papers, values and derivatives, from 0 to pi."""

import math

import pytest
import torch

from aroface.heads import ada_margin, arc_margin, combined_margin, cos_margin
from aroface.heads.margins import ada_scaler, mag_margins, mag_regulariser, shifted_cosines

ANGLES = [0.0, 0.05, 0.35, 1.25, 1.55, 1.6, 2.0, math.pi - 0.51, math.pi - 0.49, 3.0, math.pi]


def cosines_at(*angles):
    return torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64)


def arcface(theta, m, continuation):
    """In plain Python, branch by branch."""
    if continuation == "easy":
        return math.cos(theta + m) if theta < math.pi / 2 else math.cos(theta)
    if theta + m <= math.pi or continuation == "plain":
        return math.cos(theta + m)
    return -2 - math.cos(theta + m) if continuation == "reflect" else math.cos(theta) - m * math.sin(m)


def psi(angle):
    half_waves = int(angle // math.pi)
    return (-1) ** half_waves * math.cos(angle) - 2 * half_waves


@pytest.mark.parametrize("continuation", ["reflect", "linear", "plain", "easy"])
@pytest.mark.parametrize("theta", ANGLES)
def test_arcface_value(theta, continuation):
    found = arc_margin(cosines_at(theta), 0.5, continuation=continuation).item()
    # sin(acos(cos)) is exact to half the digits only at the ends of the range
    assert found == pytest.approx(arcface(theta, 0.5, continuation), abs=2e-6)


@pytest.mark.parametrize("continuation", ["reflect", "linear"])
def test_arcface_falls_all_the_way(continuation):
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert (arc_margin(cosines, 0.5, continuation=continuation).diff() > 0).all()


def test_arcface_plain_rises_beyond_pi():
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert (arc_margin(cosines, 0.5, continuation="plain").diff() < 0).any()


@pytest.mark.parametrize("degrees", [20, 72])
def test_gradient_of_the_margin_exact_and_straight_through(degrees):
    theta, m = math.radians(degrees), 0.5
    for gradient, expected in (("exact", math.sin(theta + m) / math.sin(theta)), ("straight_through", 1.0)):
        cosine = cosines_at(theta).requires_grad_()
        value = arc_margin(cosine, m, gradient=gradient)
        assert value.item() == pytest.approx(math.cos(theta + m))
        assert torch.autograd.grad(value.sum(), cosine)[0].item() == pytest.approx(expected)


def test_exact_gradient_at_the_figures_of_the_literature():
    assert math.sin(math.radians(72) + 0.5) / math.sin(math.radians(72)) == pytest.approx(1.03, abs=0.005)
    assert math.sin(math.radians(20) + 0.5) / math.sin(math.radians(20)) == pytest.approx(2.2, abs=0.01)


MARGINS = {
    "arcface": lambda c, g: arc_margin(c, 0.5, gradient=g),
    "arcface linear": lambda c, g: arc_margin(c, 0.5, gradient=g, continuation="linear"),
    "arcface easy": lambda c, g: arc_margin(c, 0.5, gradient=g, continuation="easy"),
    "combined": lambda c, g: combined_margin(c, 1.35, 0.2, 0.1, gradient=g),
    "combined plain": lambda c, g: combined_margin(c, 3.0, 0.2, 0.1, gradient=g, continuation="plain"),
    "adaface": lambda c, g: ada_margin(c, 0.4, torch.tensor(-0.7, dtype=torch.float64), gradient=g),
}


@pytest.mark.parametrize("name", MARGINS)
def test_exact_gradient_is_the_finite_difference(name):
    cosines = torch.linspace(-0.995, 0.995, 48, dtype=torch.float64)
    step = 1e-7
    difference = (MARGINS[name](cosines + step, "exact") - MARGINS[name](cosines - step, "exact")) / (2 * step)
    cosines.requires_grad_()
    (found,) = torch.autograd.grad(MARGINS[name](cosines, "exact").sum(), cosines)
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MARGINS)
def test_straight_through_changes_the_gradient_alone(name):
    cosines = torch.linspace(-1, 1, 41, requires_grad=True)
    value = MARGINS[name](cosines, "straight_through")
    torch.testing.assert_close(value, MARGINS[name](cosines, "exact"))
    assert torch.equal(torch.autograd.grad(value.sum(), cosines)[0], torch.ones(41))


@pytest.mark.parametrize("name", MARGINS)
def test_gradients_are_finite_at_both_ends_in_float32(name):
    cosines = torch.tensor([-1.0, -1 + 6e-8, 1 - 6e-8, 1.0], requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(MARGINS[name](cosines, "exact").sum(), cosines)[0]).all()


def test_zero_margin_is_the_cosine():
    cosines = torch.linspace(-0.99, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(arc_margin(cosines, 0.0), cosines)
    torch.testing.assert_close(cos_margin(cosines, 0.0), cosines)
    torch.testing.assert_close(combined_margin(cosines, 1.0, 0.0, 0.0), cosines)
    torch.testing.assert_close(ada_margin(cosines, 0.0, torch.zeros(50)), cosines)


@pytest.mark.parametrize(("m1", "m2", "m3"), [(1.0, 0.5, 0.0), (1.0, 0.3, 0.2), (1.35, 0.2, 0.1), (4.0, 1.5, 0.0)])
@pytest.mark.parametrize("theta", ANGLES)
def test_combined_value(theta, m1, m2, m3):
    found = combined_margin(cosines_at(theta), m1, m2, m3).item()
    assert found == pytest.approx(psi(m1 * theta + m2) - m3, abs=1e-5)
    plain = combined_margin(cosines_at(theta), m1, m2, m3, continuation="plain").item()
    assert plain == pytest.approx(math.cos(m1 * theta + m2) - m3, abs=1e-5)


def test_combined_has_arcface_and_cosface_as_its_corners():
    cosines = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(combined_margin(cosines, 1.0, 0.5, 0.0), arc_margin(cosines, 0.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(combined_margin(cosines, 1.0, 0.0, 0.4), cos_margin(cosines, 0.4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [0.0, 5.0, 20.0, 45.0, 1e6])
@pytest.mark.parametrize("theta", [0.01, 0.8, 2.0, 3.1])
def test_adaface_value(norm, theta):
    mean, std, h, m = 20.0, 9.0, 0.333, 0.4
    scaler = max(-1.0, min(1.0, (min(max(norm, 1e-3), 100) - mean) / (std + 1e-3) * h))
    clipped = math.acos(max(-1 + 1e-3, min(1 - 1e-3, math.cos(theta))))
    expected = math.cos(max(1e-3, min(math.pi - 1e-3, clipped - m * scaler))) - (m + m * scaler)
    found_scaler = ada_scaler(torch.tensor([norm]), torch.tensor(mean), torch.tensor(std), h)
    found = ada_margin(torch.tensor([math.cos(theta)], dtype=torch.float64), m, found_scaler.double())
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_adaface_is_a_fixed_margin_at_the_mean_and_at_the_ends():
    cosines = torch.linspace(-0.9, 0.9, 30, dtype=torch.float64)
    scalers = {-1.0: arc_margin(cosines, 0.4), 0.0: cos_margin(cosines, 0.4)}
    for scaler, expected in scalers.items():
        torch.testing.assert_close(ada_margin(cosines, 0.4, torch.tensor(scaler)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "margin"), [(0.0, 0.45), (10.0, 0.45), (60.0, 0.625), (110.0, 0.8), (1e9, 0.8)])
def test_magface_margin(norm, margin):
    found = mag_margins(torch.tensor([norm]), (10.0, 110.0), (0.45, 0.8))
    assert found.item() == pytest.approx(margin, rel=1e-6)


def test_magface_regulariser_falls_up_to_the_largest_norm_and_ends_flat():
    norms = torch.linspace(10, 110, 101, dtype=torch.float64, requires_grad=True)
    value = mag_regulariser(norms, (10.0, 110.0))
    (slope,) = torch.autograd.grad(value.sum(), norms)
    assert (value.diff() < 0).all()
    torch.testing.assert_close(slope, 1 / 110**2 - 1 / norms.detach().square(), rtol=1e-9, atol=1e-12)
    outside = torch.tensor([3.0, 500.0], requires_grad=True)
    assert not torch.autograd.grad(mag_regulariser(outside, (10.0, 110.0)).sum(), outside)[0].any()


def test_magface_target_pulls_the_norm_down_and_the_regulariser_up():
    norms = torch.tensor([40.0], requires_grad=True)
    target = arc_margin(torch.tensor([0.5]), mag_margins(norms, (10.0, 110.0), (0.45, 0.8)), continuation="easy")
    (slope,) = torch.autograd.grad(target.sum(), norms)
    assert slope.item() == pytest.approx(-math.sin(math.acos(0.5) + 0.45 + 0.0035 * 30) * 0.0035, rel=1e-5)


@pytest.mark.parametrize("theta", ANGLES)
def test_shifted_cosines_have_no_continuation(theta):
    assert shifted_cosines(cosines_at(theta), 0.5).item() == pytest.approx(math.cos(theta + 0.5), abs=2e-6)
