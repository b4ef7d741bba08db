"""Search for the small misalignment that raises the loss of a face most: sign ascent, or the worst of some corners.

Source: ARoFace, arXiv:2407.14972, Sec. 3: `psi <- Proj_B(psi + eta sign(grad_psi L))`, k times from a noisy identity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aroface.alignment.bounds import project
from aroface.alignment.warp import Alignment, identity_alignment, warp
from aroface.config.schema import AlignmentConfig

__all__ = ["LossOf", "find_worst", "random_corner", "start_alignment", "step_along", "worst_of_corners"]

#: Losses of warped images (n, 3, H, W) under labels (n,): (n,), or a scalar for sign ascent. Sums and means give the
#: same ascent, for only the signs of the gradient are used and no image's loss depends on another image's psi beyond
#: batch statistics.
LossOf = Callable[[Tensor, Tensor], Tensor]

#: Each of the four parameters up or down.
_CORNERS = 16


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
        psi = step_along(psi, 2 * coin - 1, config)
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
        loss_of: losses of warped images; see `LossOf`.
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
            loss = loss_of(warp(images, variables, fill=fill), labels).sum()
        scale, angle, shift = torch.autograd.grad(loss, list(variables))
        signs = torch.cat([scale[:, None], angle[:, None], shift], 1).sign()
        psi = step_along(variables.detached(), signs, config)
    return psi


def worst_of_corners(
    images: Tensor,
    labels: Tensor,
    *,
    losses_of: LossOf,
    config: AlignmentConfig,
    generator: torch.Generator,
    fill: float = -1.0,
) -> Alignment:
    """Try `config.candidates` different random corners on every image, forward only, and keep the worst of each.

    A corner is what sign ascent reaches when no sign changes on the way: start + steps x eta x signs, inside B. With
    one step and 16 candidates nothing that the ascent can reach is worse. Arguments as `find_worst`, but `losses_of`
    gives one loss per image; it is called once per candidate with all images.
    """
    count = len(images)
    start = start_alignment(count, config, generator)
    order = torch.rand(count, _CORNERS, generator=generator, device=generator.device).argsort(1)
    worst = torch.full((count,), -torch.inf, device=images.device)
    found = identity_alignment(count, device=images.device)
    with torch.no_grad():
        for corner in order[:, : config.candidates].T:
            bits = torch.stack([(corner >> place) & 1 for place in range(4)], 1)
            psi = step_along(start, config.steps * (2.0 * bits - 1), config)
            losses = losses_of(warp(images, psi, fill=fill), labels).float()
            is_worse = losses > worst
            worst = torch.where(is_worse, losses, worst)
            found = _where(is_worse, psi, found)
    return found


def step_along(psi: Alignment, signs: Tensor, config: AlignmentConfig) -> Alignment:
    """One step from psi, psi + eta x signs, inside B; signs (B, 4) in the order scale, angle, shift x, shift y."""
    moved = Alignment(
        psi.scale + config.scale_step * signs[:, 0],
        psi.angle_rad + config.angle_step_rad * signs[:, 1],
        psi.shift + config.shift_step * signs[:, 2:],
    )
    return project(moved, config)


def _where(condition: Tensor, chosen: Alignment, other: Alignment) -> Alignment:
    return Alignment(
        torch.where(condition, chosen.scale, other.scale),
        torch.where(condition, chosen.angle_rad, other.angle_rad),
        torch.where(condition[:, None], chosen.shift, other.shift),
    )
