"""The geometry of the warp: every convention of its docstring is pinned here."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from aroface.alignment import Alignment, identity_alignment, landmark_displacement_px, warp
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ShapeError

VECTORS = Path(__file__).parents[1] / "goldens" / "protocol_vectors.json"


def alignment(batch, scale=1.0, angle=0.0, shift=(0.0, 0.0), dtype=torch.float32):
    return Alignment(
        torch.full((batch,), scale, dtype=dtype),
        torch.full((batch,), angle, dtype=dtype),
        torch.tensor([shift] * batch, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_returns_the_input_bit_for_bit(dtype):
    images = torch.randn(3, 3, 17, 17).to(dtype)
    assert torch.equal(warp(images, identity_alignment(3), fill=-1.0), images)


def test_identity_rows_are_untouched_beside_moved_ones():
    images = torch.randn(2, 3, 16, 16)
    psi = Alignment(torch.tensor([1.0, 1.1]), torch.zeros(2), torch.zeros(2, 2))
    warped = warp(images, psi, fill=-1.0)
    assert torch.equal(warped[0], images[0])
    assert not torch.equal(warped[1], images[1])


def test_identity_still_has_the_gradient_of_psi():
    images = torch.randn(1, 3, 16, 16)
    psi = Alignment(*(part.requires_grad_() for part in identity_alignment(1)))
    weights = torch.randn_like(images)
    gradients = torch.autograd.grad((warp(images, psi, fill=-1.0) * weights).sum(), list(psi))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_quarter_turn_is_rot90_counter_clockwise():
    images = torch.randn(2, 3, 16, 16)
    warped = warp(images, alignment(2, angle=math.pi / 2), fill=-1.0)
    torch.testing.assert_close(warped, torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)


def test_one_pixel_of_shift_moves_one_pixel():
    images = torch.randn(1, 3, 16, 16)
    right = warp(images, alignment(1, shift=(2 / 16, 0)), fill=-1.0)
    torch.testing.assert_close(right[..., :-1], images[..., 1:], atol=1e-5, rtol=0)
    assert (right[..., -1] == -1).all()
    down = warp(images, alignment(1, shift=(0, 2 / 16)), fill=-1.0)
    torch.testing.assert_close(down[..., :-1, :], images[..., 1:, :], atol=1e-5, rtol=0)


def test_larger_scale_shrinks_the_face():
    images = torch.full((1, 3, 32, 32), -1.0)
    images[..., 8:24, 8:24] = 1.0
    assert warp(images, alignment(1, scale=1.5), fill=-1.0).sum() < images.sum()
    assert warp(images, alignment(1, scale=0.7), fill=-1.0).sum() > images.sum()


def test_outside_is_the_fill_value():
    warped = warp(torch.zeros(1, 3, 16, 16), alignment(1, shift=(3.0, 0.0)), fill=-0.5)
    assert (warped == -0.5).all()


def test_gradient_of_psi_equals_finite_differences():
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    psi = alignment(2, scale=1.07, angle=0.13, shift=(0.031, -0.057), dtype=torch.float64)
    inputs = tuple(part.clone().requires_grad_() for part in psi)
    assert torch.autograd.gradcheck(lambda s, a, t: warp(images, Alignment(s, a, t), fill=-1.0), inputs, eps=1e-7)


def test_landmark_displacement_equals_the_map_in_pixels():
    scale, angle, shift = 1.1, math.radians(10), (4 / 56, -2 / 56)
    points = (ARCFACE_TEMPLATE_112 + 0.5) / 56 - 1
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = scale * points @ rotation.T + np.array(shift)
    expected = np.linalg.norm(moved - points, axis=1) * 56
    found = landmark_displacement_px(alignment(1, scale, angle, shift, dtype=torch.float64))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_landmarks_move_as_the_published_vector_says():
    """TV-11: all five landmarks under theta = 10 deg, s = 1.1, t = (4, -2) px."""
    vector = json.loads(VECTORS.read_text(encoding="utf-8"))["TV11"]
    shift = tuple(pixels / 56 for pixels in vector["t"])
    matrix = alignment(1, vector["scale"], math.radians(vector["theta_deg"]), shift, dtype=torch.float64).as_matrix()[0]
    assert len(vector["points"]) == len(ARCFACE_TEMPLATE_112) == 5
    for landmark, wanted in zip(ARCFACE_TEMPLATE_112, vector["points"], strict=True):
        point = torch.tensor([*((float(x) + 0.5) / 56 - 1 for x in landmark), 1.0], dtype=torch.float64)
        pixels = (matrix @ point + 1) * 56 - 0.5
        torch.testing.assert_close(pixels, torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=0)


def test_wrong_shapes_are_named():
    with pytest.raises(ShapeError, match=r"got \(3, 16, 16\) and 1"):
        warp(torch.zeros(3, 16, 16), identity_alignment(1), fill=-1.0)
