"""The set B that the attack may move in: a box in the parameters, and a budget on the landmarks."""

import torch

from aroface.alignment.warp import Alignment, identity_alignment, landmark_displacement_px
from aroface.config.schema import AlignmentConfig

__all__ = ["project"]


def project(alignment: Alignment, config: AlignmentConfig) -> Alignment:
    """Clip every parameter to its box; then pull psi towards the identity until no landmark exceeds the budget.

    The pull scales (s - 1, phi, t) by one factor f in [0, 1] per image, found by bisection: at f = 0 nothing moves, and
    the factor kept is always one that was checked, so the budget holds exactly.

    Args:
        alignment: (B,) transforms.
        config: boxes around the identity and `landmark_budget_px`.

    Returns:
        (B,) transforms inside B.
    """
    boxed = Alignment(
        alignment.scale.clamp(1 - config.scale_box, 1 + config.scale_box),
        alignment.angle_rad.clamp(-config.angle_box_rad, config.angle_box_rad),
        alignment.shift.clamp(-config.shift_box, config.shift_box),
    )
    if config.landmark_budget_px is None:
        return boxed
    low = torch.zeros_like(boxed.scale)
    high = torch.ones_like(boxed.scale)
    fits = landmark_displacement_px(boxed).amax(1) <= config.landmark_budget_px
    for _ in range(20):
        middle = (low + high) / 2
        inside = landmark_displacement_px(_scaled(boxed, middle)).amax(1) <= config.landmark_budget_px
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return _scaled(boxed, torch.where(fits, torch.ones_like(low), low))


def _scaled(alignment: Alignment, factor: torch.Tensor) -> Alignment:
    identity = identity_alignment(len(factor), device=factor.device, dtype=factor.dtype)
    return Alignment(
        torch.lerp(identity.scale, alignment.scale, factor),
        alignment.angle_rad * factor,
        alignment.shift * factor[:, None],
    )
