"""Sign ascent on the alignment: which small misalignment raises the loss of a face most.

Source: ARoFace, arXiv:2407.14972, Sec. 3: `psi <- Proj_B(psi + eta sign(grad_psi L))`, k times from a noisy identity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aroface.alignment.bounds import project
from aroface.alignment.warp import Alignment, warp
from aroface.config.schema import AlignmentConfig

__all__ = ["LossOf", "find_worst", "random_corner", "start_alignment"]

#: Loss of warped images (n, 3, H, W) under labels (n,): a scalar. Sums and means give the same attack, for only the
#: signs of the gradient are used and no image's loss depends on another image's psi beyond batch statistics.
LossOf = Callable[[Tensor, Tensor], Tensor]


def start_alignment(count: int, config: AlignmentConfig, generator: torch.Generator) -> Alignment:
    """psi_0 ~ N(identity, start_noise^2), (count,) on the device of the generator, inside B."""
    noise = torch.randn(count, 4, generator=generator, device=generator.device) * config.start_noise
    return project(Alignment(1 + noise[:, 0], noise[:, 1], noise[:, 2:]), config)


def random_corner(count: int, config: AlignmentConfig, generator: torch.Generator) -> Alignment:
    """The attack without its gradient: the same start, k steps of random sign, the same bounds.

    The control that every claim about the adversary needs: it reaches the same set of psi at no cost.
    """
    psi = start_alignment(count, config, generator)
    for _ in range(config.steps):
        coin = torch.randint(0, 2, (count, 4), generator=generator, device=generator.device).float()
        psi = _step(psi, 2 * coin - 1, config)
    return psi


def find_worst(
    images: Tensor,
    labels: Tensor,
    *,
    loss_of: LossOf,
    config: AlignmentConfig,
    generator: torch.Generator,
    fill: float = -1.0,
) -> Alignment:
    """Run the attack on every given image.

    Only the gradient with respect to psi is formed: parameters get no `.grad`. The caller freezes batch statistics
    (`frozen_statistics`).

    Args:
        images: (n, 3, H, W) float, normalised.
        labels: (n,) class indices.
        loss_of: loss of warped images; see `LossOf`.
        config: steps, step sizes and bounds.
        generator: of the start, on the device of the images.
        fill: value outside the image; -1 is black for mean = std = 127.5.

    Returns:
        (n,) transforms inside B, outside of any graph.
    """
    psi = start_alignment(len(images), config, generator)
    for _ in range(config.steps):
        variables = Alignment(*(part.requires_grad_() for part in psi.detached()))
        with torch.enable_grad():
            loss = loss_of(warp(images, variables, fill=fill), labels)
        scale, angle, shift = torch.autograd.grad(loss, list(variables))
        signs = torch.cat([scale[:, None], angle[:, None], shift], 1).sign()
        psi = _step(variables.detached(), signs, config)
    return psi


def _step(psi: Alignment, signs: Tensor, config: AlignmentConfig) -> Alignment:
    moved = Alignment(
        psi.scale + config.scale_step * signs[:, 0],
        psi.angle_rad + config.angle_step_rad * signs[:, 1],
        psi.shift + config.shift_step * signs[:, 2:],
    )
    return project(moved, config)
