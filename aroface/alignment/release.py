"""The attack as the published ARoFace code runs it, so that both can be compared on the same draws.

What differs from `realign`, and what it does, is listed in docs/alignment.md: the whole batch is attacked and three
quarters of it thrown away; clean and warped images are drawn independently; a one-pixel border of black makes the
identity a zoom-out; the shift is clipped by the start of the angle; the attack pass updates the running statistics;
every rank draws the same numbers.

Legend: B images of a rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from aroface.alignment.attack import LossOf
from aroface.alignment.warp import Alignment
from aroface.config.alignment import release_counts
from aroface.config.schema import AlignmentConfig

__all__ = [
    "ReleaseDraws",
    "ReleaseMix",
    "draw_release",
    "release_attack",
    "release_counts",
    "release_mix",
    "release_warp",
]

_ETA_SPREAD = 0.001
#: How far scale, angle and shift may move from where they started; the upper end of the shift counts from the angle.
_SCALE_DOWN, _SCALE_UP, _ANGLE, _SHIFT = 0.5, 1.5, 0.8, 0.3


class ReleaseDraws(NamedTuple):
    """Everything random in one step."""

    etas: tuple[float, float, float]  #: step of scale, angle and shift
    start: Alignment  #: (B,) psi_0
    clean: Tensor  #: places of the images that are taken as they are
    warped: Tensor  #: places of the images whose warped version is taken


class ReleaseMix(NamedTuple):
    """The batch that is trained on: the clean images first, then the warped ones."""

    images: Tensor  #: (B, 3, H, W)
    labels: Tensor  #: (B,)


def draw_release(batch: int, config: AlignmentConfig, generator: torch.Generator) -> ReleaseDraws:
    """Draw a step in the order of the published code, whose generator is numpy's: the same law, other numbers."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    jitter = (normal(3) * _ETA_SPREAD).tolist()
    etas = (config.scale_step + jitter[0], config.angle_step_rad + jitter[1], config.shift_step + jitter[2])
    noise = config.start_noise
    start = Alignment(1 + noise * normal(batch), noise * normal(batch), noise * normal(batch, 2))
    clean, warped = (
        torch.randperm(batch, generator=generator, device=generator.device)[:count]
        for count in release_counts(batch, config.share)
    )
    return ReleaseDraws(etas, start, clean, warped)


def release_warp(images: Tensor, alignment: Alignment) -> Tensor:
    """Resample from the image with a one-pixel border of -1, whose grid is nevertheless that of the image."""
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    grid = functional.affine_grid(alignment.as_matrix(), list(images.shape), align_corners=False)
    return functional.grid_sample(padded, grid, padding_mode="border", align_corners=False)


def release_attack(
    images: Tensor, labels: Tensor, *, loss_of: LossOf, config: AlignmentConfig, draws: ReleaseDraws
) -> Alignment:
    """Sign ascent of the published code on every image; arguments as `release_mix`."""
    start, psi = draws.start, draws.start
    eta_scale, eta_angle, eta_shift = draws.etas
    for _ in range(config.steps):
        variables = [part.detach().clone().requires_grad_() for part in psi]
        with torch.enable_grad():
            loss = loss_of(release_warp(images, Alignment(*variables)), labels).mean()
        scale, angle, shift = (gradient.sign() for gradient in torch.autograd.grad(loss, variables))
        psi = Alignment(
            _clip(psi.scale + eta_scale * scale, start.scale - _SCALE_DOWN, start.scale + _SCALE_UP),
            _clip(psi.angle_rad + eta_angle * angle, start.angle_rad - _ANGLE, start.angle_rad + _ANGLE),
            _clip(psi.shift + eta_shift * shift, start.shift - _SHIFT, start.angle_rad[:, None] + _SHIFT),
        )
    return psi


def release_mix(
    images: Tensor, labels: Tensor, *, loss_of: LossOf, config: AlignmentConfig, draws: ReleaseDraws
) -> ReleaseMix:
    """One step of the published attack.

    Args:
        images: (B, 3, H, W) float32, normalised.
        labels: (B,) class indices.
        loss_of: losses of the whole batch in training mode; it may update running statistics, as it does there.
        config: steps and share; boxes and budget are those of the published code.
        draws: of `draw_release`.
    """
    psi = release_attack(images, labels, loss_of=loss_of, config=config, draws=draws)
    with torch.no_grad():
        warped = release_warp(images, psi)
    return ReleaseMix(
        torch.cat([images[draws.clean], warped[draws.warped]]), torch.cat([labels[draws.clean], labels[draws.warped]])
    )


def _clip(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, low), high)
