"""The local field: its splines against scipy, its bounds, its gradient, and that it does not fold."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from aroface.alignment import identity_alignment, landmark_displacement_px, realign, warp
from aroface.alignment.elastic import displacement_field, find_worst_elastic, lattice_points, random_elastic
from aroface.config.alignment import ElasticConfig
from aroface.config.schema import AlignmentConfig


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def config(steps=1, budget_px=None, **elastic):
    return AlignmentConfig(kind="elastic", steps=steps, landmark_budget_px=budget_px, elastic=ElasticConfig(**elastic))


def lattice(count=2, spacing=28.0, seed=0, dtype=torch.float64):
    points = lattice_points(spacing)
    return torch.randn(count, 2, points, points, generator=generator(seed)).to(dtype)


@pytest.mark.parametrize(("size", "spacing"), [((112, 112), 28.0), ((48, 56), 30.0), ((32, 32), 10.0)])
def test_field_equals_the_tensor_product_spline_of_scipy(size, spacing):
    points = lattice(spacing=spacing)
    found = displacement_field(points, size, spacing_px=spacing)
    knots = (np.arange(points.shape[-1] + 4) - 3.0) * spacing
    basis = [
        BSpline.design_matrix((np.arange(side) + 0.5) * 112 / side, knots, 3).toarray() for side in size
    ]  # (pixels, points)
    expected = np.einsum("hi,bcij,wj->bhwc", basis[0], points.numpy(), basis[1]) / 56
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_constant_lattice_is_a_shift():
    images = torch.randn(2, 3, 16, 16)
    points = torch.zeros(2, 2, lattice_points(28.0), lattice_points(28.0))
    points[:, 0] = 112 / 16  # one pixel to the right
    field = displacement_field(points, (16, 16), spacing_px=28.0)
    warped = warp(images, identity_alignment(2), fill=-1.0, field=field)
    torch.testing.assert_close(warped[..., :-1], images[..., 1:], atol=1e-5, rtol=0)


def test_zero_field_returns_the_input_bit_for_bit_and_any_other_does_not():
    images = torch.randn(2, 3, 16, 16)
    points = lattice(dtype=torch.float32)
    points[0] = 0
    field = displacement_field(points, (16, 16), spacing_px=28.0)
    warped = warp(images, identity_alignment(2), fill=-1.0, field=field)
    assert torch.equal(warped[0], images[0])
    assert not torch.equal(warped[1], images[1])


def test_gradient_of_the_lattice_equals_finite_differences():
    images = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    points = lattice(1, spacing=100.0)

    def warped(values):
        field = displacement_field(values, (7, 7), spacing_px=100.0)
        return warp(images, identity_alignment(1, dtype=torch.float64), fill=-1.0, field=field)

    assert torch.autograd.gradcheck(warped, (points.requires_grad_(),), eps=1e-7)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("budget_px", [None, 3.0])
def test_no_pixel_moves_farther_than_the_amplitude(steps, budget_px):
    settings = config(steps=steps, budget_px=budget_px, amplitude_px=3.0, step_px=2.0)
    images = torch.randn(5, 3, 24, 24)
    weights = torch.randn(5, 3, 24, 24)
    for psi, field in (
        find_worst_elastic(
            images, None, loss_of=lambda x, y: (x * weights).sum(), config=settings, generator=generator()
        ),
        random_elastic(5, (24, 24), settings, generator()),
    ):
        assert field.abs().max() * 56 <= 3.0 + 1e-5
        assert ((psi.scale - 1).abs() <= 0.2 + 1e-6).all()
        assert (psi.angle_rad.abs() <= 0.2 + 1e-6).all()
        assert (psi.shift.abs() <= 0.2 + 1e-6).all()
        if budget_px:
            assert landmark_displacement_px(psi).max() <= budget_px + 1e-4


def test_the_largest_allowed_amplitude_does_not_fold():
    """The determinant of x + u(x) stays positive for the worst kind of lattice: neighbours pulled together."""
    spacing = 28.0
    amplitude = 0.4886 * spacing
    points = lattice_points(spacing)
    for seed in range(50):
        signs = torch.randint(0, 2, (1, 2, points, points), generator=generator(seed)) * 2.0 - 1
        field = displacement_field(amplitude * signs.double(), (224, 224), spacing_px=spacing)[0] * 112  # pixels of 224
        dx, dy = torch.gradient(field, dim=(1, 0))
        determinant = (1 + dx[..., 0]) * (1 + dy[..., 1]) - dx[..., 1] * dy[..., 0]
        assert determinant.min() > 0


def test_attack_with_a_field_hurts_more_than_the_same_field_at_random():
    side = torch.linspace(-3, 3, 32)
    images = torch.sin(side * 2)[None, None, None] * torch.cos(side)[None, None, :, None] * torch.ones(16, 3, 1, 1)
    target = images.roll((1, 2), (2, 3))

    def loss(x, y):
        return (x - target).square().mean((1, 2, 3))

    settings = config(amplitude_px=4.0, step_px=4.0, spacing_px=28.0)
    psi, field = find_worst_elastic(images, None, loss_of=loss, config=settings, generator=generator())
    attacked = loss(warp(images, psi, fill=-1.0, field=field), None).mean()
    random = [random_elastic(16, (32, 32), settings, generator(seed)) for seed in range(10)]
    by_chance = sum(loss(warp(images, p, fill=-1.0, field=f), None).mean() for p, f in random) / 10
    alone = loss(warp(images, psi, fill=-1.0), None).mean()
    assert attacked > 1.1 * by_chance
    assert attacked > alone


def test_realign_warps_the_share_with_its_field():
    images = torch.randn(8, 3, 16, 16)
    result = realign(
        images, torch.zeros(8), config=config(), loss_of=lambda x, y: x.square().sum(), generator=generator()
    )
    assert len(result.chosen) == 2
    assert torch.equal(result.clean, images[result.chosen])
    only_psi = warp(result.clean, result.alignment, fill=-1.0)
    assert not torch.allclose(result.images[result.chosen], only_psi)
