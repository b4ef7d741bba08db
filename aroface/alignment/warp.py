"""A similarity transform per face, as a differentiable resampling.

Convention, pinned by tests: `x_in = s R(phi) x_out + t` maps output pixel centres to input locations, in coordinates
where the image spans [-1, 1] (align_corners=False), origin at the centre, x right, y down, R(phi) = [[cos, -sin], [sin,
cos]]. So s > 1 shrinks the face, and a positive angle turns it counter-clockwise on the screen. One unit of shift is
half the image: 56 px of 112.

Legend: B images, H W height and width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ShapeError

__all__ = ["Alignment", "identity_alignment", "landmark_displacement_px", "warp"]

_TEMPLATE_PX = 112


class Alignment(NamedTuple):
    """psi, one similarity transform per image."""

    scale: Tensor  #: (B,) s > 0; 1 keeps the size
    angle_rad: Tensor  #: (B,) phi
    shift: Tensor  #: (B, 2) t = (x, y) in half images

    def as_matrix(self) -> Tensor:
        """(B, 2, 3) affine matrices from output to input coordinates."""
        cos, sin = self.scale * torch.cos(self.angle_rad), self.scale * torch.sin(self.angle_rad)
        rows = (torch.stack([cos, -sin, self.shift[:, 0]], 1), torch.stack([sin, cos, self.shift[:, 1]], 1))
        return torch.stack(rows, 1)

    def detached(self) -> "Alignment":
        """The same values outside of the graph."""
        return Alignment(self.scale.detach(), self.angle_rad.detach(), self.shift.detach())


def identity_alignment(
    batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Alignment:
    """The identity psi = (1, 0, 0, 0) for every image."""
    return Alignment(
        torch.ones(batch, device=device, dtype=dtype),
        torch.zeros(batch, device=device, dtype=dtype),
        torch.zeros(batch, 2, device=device, dtype=dtype),
    )


def warp(images: Tensor, alignment: Alignment, *, fill: float, field: Tensor | None = None) -> Tensor:
    """Resample each image under its similarity transform, bilinearly.

    Args:
        images: (B, 3, H, W) float.
        alignment: one transform per image; float32 or float64.
        fill: value of everything outside the image, in the units of `images`.
        field: (B, H, W, 2) local displacement added to x_in, half images along x and y; None stands for zero.

    Returns:
        (B, 3, H, W) of the dtype and memory layout of `images`, differentiable in images, alignment and field. An image
        whose transform is exactly the identity comes back bit for bit.

    Raises:
        ShapeError: `images` is not 4-D, or the batch sizes differ.

    Source: ARoFace, arXiv:2407.14972, Sec. 3. Unlike its release there is no one-pixel pad, which makes the release's
    identity a 1.8 % zoom-out with a black border.
    """
    if images.dim() != 4 or len(alignment.scale) != len(images):
        raise ShapeError(
            f"warp takes images (B, C, H, W) and B transforms; got {tuple(images.shape)} and {len(alignment.scale)}."
        )
    with torch.autocast(images.device.type, enabled=False):
        work = images.to(alignment.scale.dtype)
        grid = functional.affine_grid(alignment.as_matrix(), list(work.shape), align_corners=False)
        if field is not None:
            grid = grid + field
        # Zero padding of (image - fill) is a constant border of `fill`, blended over the last half pixel.
        warped = functional.grid_sample(work - fill, grid, padding_mode="zeros", align_corners=False) + fill
        is_identity = (alignment.scale == 1) & (alignment.angle_rad == 0) & (alignment.shift == 0).all(1)
        if field is not None:
            is_identity &= (field == 0).flatten(1).all(1)
        # The value of the untouched input with the gradient of the resampling.
        untouched = work.detach() + (warped - warped.detach())
        exact = torch.where(is_identity.view(-1, 1, 1, 1), untouched, warped)
    result: Tensor = exact.to(images.dtype).contiguous(memory_format=_layout(images))
    return result


def _layout(images: Tensor) -> torch.memory_format:
    is_channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


def landmark_displacement_px(alignment: Alignment) -> Tensor:
    """How far the map moves each template landmark, (B, 5) in pixels of a 112-px face.

    The distance between a landmark and the place it is sampled from, |s R x + t - x|.
    """
    template = torch.as_tensor(ARCFACE_TEMPLATE_112, dtype=alignment.scale.dtype, device=alignment.scale.device)
    points = (2 * template + 1) / _TEMPLATE_PX - 1  # pixel centres to [-1, 1]
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    moved = torch.einsum("bij,kj->bki", alignment.as_matrix(), homogeneous)
    distances: Tensor = (moved - points).norm(dim=2)
    return distances * (_TEMPLATE_PX / 2)
