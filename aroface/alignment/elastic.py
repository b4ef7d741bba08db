"""A smooth local deformation beside the global alignment, attacked by the same sign ascent.

A coarse lattice of displacements is interpolated by uniform cubic B-splines: `x_in = s R(phi) x_out + t + u(x_out)`.
The splines are non-negative and sum to one, so no pixel moves farther than the largest displacement of the lattice, and
the local part cannot fold while that stays below 0.4886 of the spacing (Choi and Lee, "Injectivity conditions of 2D and
3D uniform cubic B-spline functions", 2000); the configuration keeps to it.

Source of the idea: DArFace, arXiv:2505.08423, which adds an elastic field to the global parameters. There it is a
smoothed random field of attacked strength; here each lattice point is attacked.

Legend: B images, G lattice points along a side, H W height and width; px are pixels of a 112-px face.
"""

import math

import torch
from torch import Tensor

from aroface.alignment.attack import LossOf, start_alignment, step_along
from aroface.alignment.warp import Alignment, warp
from aroface.config.schema import AlignmentConfig

__all__ = ["displacement_field", "find_worst_elastic", "lattice_points", "random_elastic"]

_FACE_PX = 112


def lattice_points(spacing_px: float) -> int:
    """G: points along a side, so that every pixel lies between the second and the last but one."""
    return math.ceil(_FACE_PX / spacing_px) + 3


def displacement_field(lattice_px: Tensor, size: tuple[int, int], *, spacing_px: float) -> Tensor:
    """Interpolate the lattice to every pixel.

    Args:
        lattice_px: (B, 2, G, G) displacements along x and y, indexed [.., row, column].
        size: H and W of the images, any number of pixels for the same face.
        spacing_px: distance of neighbouring points.

    Returns:
        (B, H, W, 2) in half images, as `warp` takes it.
    """
    rows, columns = (
        _spline_weights(side, lattice_px.shape[-1], spacing_px, lattice_px.device).to(lattice_px.dtype) for side in size
    )
    return torch.einsum("hi,bcij,wj->bhwc", rows, lattice_px, columns) / (_FACE_PX / 2)


def _spline_weights(side: int, points: int, spacing_px: float, device: torch.device) -> Tensor:
    """(side, G) weight of each lattice point at each pixel centre."""
    centres = (torch.arange(side, device=device, dtype=torch.float64) + 0.5) * (_FACE_PX / side) / spacing_px
    # Point 1 lies on the edge of the image, so the first of the four points around a pixel is floor(centre).
    distance = (centres[:, None] + 1 - torch.arange(points, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def find_worst_elastic(
    images: Tensor,
    labels: Tensor,
    *,
    loss_of: LossOf,
    config: AlignmentConfig,
    generator: torch.Generator,
    fill: float = -1.0,
) -> tuple[Alignment, Tensor]:
    """Sign ascent on psi and on the lattice together; arguments as `find_worst`.

    Returns:
        (n,) transforms inside B, and the field (n, H, W, 2) whose components stay within `config.elastic.amplitude_px`.
    """
    psi, lattice = _start(len(images), config, generator)
    size = (images.shape[2], images.shape[3])
    spacing = config.elastic.spacing_px
    for _ in range(config.steps):
        variables = [part.detach().requires_grad_() for part in (*psi, lattice)]
        with torch.enable_grad():
            field = displacement_field(variables[3], size, spacing_px=spacing)
            loss = loss_of(warp(images, Alignment(*variables[:3]), fill=fill, field=field), labels).sum()
        scale, angle, shift, local = torch.autograd.grad(loss, variables)
        psi = step_along(psi, torch.cat([scale[:, None], angle[:, None], shift], 1).sign(), config)
        lattice = _moved(lattice, local.sign(), config)
    return psi, displacement_field(lattice, size, spacing_px=spacing)


def random_elastic(
    count: int, size: tuple[int, int], config: AlignmentConfig, generator: torch.Generator
) -> tuple[Alignment, Tensor]:
    """The same budgets without the gradient, for comparison: random signs for psi and for every lattice point."""
    psi, lattice = _start(count, config, generator)
    for _ in range(config.steps):
        psi = step_along(psi, _coins((count, 4), generator), config)
        lattice = _moved(lattice, _coins(tuple(lattice.shape), generator), config)
    return psi, displacement_field(lattice, size, spacing_px=config.elastic.spacing_px)


def _start(count: int, config: AlignmentConfig, generator: torch.Generator) -> tuple[Alignment, Tensor]:
    psi = start_alignment(count, config, generator)
    points = lattice_points(config.elastic.spacing_px)
    noise = torch.randn(count, 2, points, points, generator=generator, device=generator.device)
    return psi, _clipped(noise * (config.start_noise * _FACE_PX / 2), config)


def _moved(lattice: Tensor, signs: Tensor, config: AlignmentConfig) -> Tensor:
    return _clipped(lattice + config.elastic.step_px * signs, config)


def _clipped(lattice: Tensor, config: AlignmentConfig) -> Tensor:
    return lattice.clamp(-config.elastic.amplitude_px, config.elastic.amplitude_px)


def _coins(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator, device=generator.device) - 1
