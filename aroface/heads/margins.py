"""Margin functions: cosines of the targets to target logits, before the logit scale. Pure.

`gradient`: `exact` differentiates the margin. `straight_through` takes d target / d cos = 1, which is what computing
the margin without gradients amounts to in arcface_torch and its descendants; the exact derivative of ArcFace is
sin(theta + m) / sin(theta), 1.03 at 72 degrees and 2.2 at 20 degrees for m = 0.5.

`continuation`: cos(theta + m) rises again once theta + m is beyond pi and would reward moving away from the class.
There the target becomes `reflect`: -2 - cos(theta + m), continuous and with a continuous slope; `linear`: cos(theta) -
m sin(m), which falls but jumps; `plain`: cos(theta + m) all the same; `easy`: no margin at all where theta is beyond
pi / 2. docs/heads.md tells which public code does which.

Legend: N targets.
"""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Continuation",
    "MarginGradient",
    "ada_margin",
    "ada_scaler",
    "arc_margin",
    "combined_margin",
    "cos_margin",
    "mag_margins",
    "mag_regulariser",
    "shifted_cosines",
]

MarginGradient = Literal["exact", "straight_through"]
Continuation = Literal["reflect", "linear", "plain", "easy"]

#: AdaFace keeps the angle this far from 0 and pi, and the norms in this range.
_ADA_EPS = 1e-3
_NORM_RANGE = (1e-3, 100.0)
#: Smallest sin^2(theta) that is differentiated; below it the angle is 0 or pi to fp32.
_MIN_SIN2 = 1e-12


def shifted_cosines(cosines: Tensor, margin: float | Tensor) -> Tensor:
    """cos(theta + m) from cos(theta), with finite derivatives at 0 and pi.

    Args:
        cosines: (N,) in [-1, 1].
        margin: m in radians, one or (N,).
    """
    angle = _angle(margin, cosines)
    return cosines * angle.cos() - _sines(cosines) * angle.sin()


def _angle(margin: float | Tensor, like: Tensor) -> Tensor:
    """The margin beside `like`; a number is written there, for the host would wait until it had sent a copy."""
    return margin.to(like) if isinstance(margin, Tensor) else like.new_full((), margin)


def arc_margin(
    cosines: Tensor,
    margin: float | Tensor,
    *,
    gradient: MarginGradient = "exact",
    continuation: Continuation = "reflect",
) -> Tensor:
    """cos(theta + m), continued as the module tells.

    Args:
        cosines: (N,) cos(theta) of the target classes.
        margin: m in radians, in [0, pi / 2]; one, or (N,) and then differentiable (MagFace).
        gradient: see the module.
        continuation: see the module.

    Returns:
        (N,) target logits before the scale.

    Source: ArcFace, arXiv:1801.07698, Eq. 3; MagFace, arXiv:2103.06627.
    """
    shifted = shifted_cosines(cosines, margin)
    angle = _angle(margin, cosines)
    beyond = cosines < -angle.cos()  # theta > pi - m
    match continuation:
        case "reflect":
            target = torch.where(beyond, -2 - shifted, shifted)
        case "linear":
            target = torch.where(beyond, cosines - angle * angle.sin(), shifted)
        case "plain":
            target = shifted
        case "easy":
            target = torch.where(cosines > 0, shifted, cosines)
    return _with_gradient(cosines, target, gradient)


def cos_margin(cosines: Tensor, margin: float) -> Tensor:
    """cos(theta) - m. Source: CosFace, arXiv:1801.09414."""
    return cosines - margin


def combined_margin(
    cosines: Tensor,
    m1: float,
    m2: float,
    m3: float,
    *,
    gradient: MarginGradient = "exact",
    continuation: Continuation = "reflect",
) -> Tensor:
    """psi(m1 theta + m2) - m3, where psi is the cosine, made to fall all the way by `reflect`.

    psi(phi) = (-1)^k cos(phi) - 2 k for phi in [k pi, (k + 1) pi]; k is 0 or 1 for m1 = 1.

    Args:
        cosines: (N,) cos(theta) of the target classes.
        m1: factor on the angle, at least 1.
        m2: added to the angle, radians.
        m3: taken off the cosine.
        gradient: see the module.
        continuation: `reflect` or `plain`.

    Returns:
        (N,) target logits before the scale.

    Source: ArcFace, arXiv:1801.07698, Eq. 4; psi from SphereFace, arXiv:1704.08063.
    """
    theta = torch.atan2(_sines(cosines), cosines)  # acos has no finite derivative at 0 and pi
    angle = m1 * theta + m2
    target = angle.cos()
    if continuation == "reflect":
        turns = (angle.detach() / math.pi).floor()
        target = (1 - 2 * (turns % 2)) * target - 2 * turns
    return _with_gradient(cosines, target - m3, gradient)


def ada_scaler(norms: Tensor, mean: Tensor, std: Tensor, h: float) -> Tensor:
    """AdaFace's image quality in [-1, 1]: how far each norm lies from the running mean, in units of std / h."""
    clipped = norms.detach().clamp(*_NORM_RANGE)
    return ((clipped - mean) / (std + _ADA_EPS) * h).clamp(-1, 1)


def ada_margin(cosines: Tensor, margin: float, scaler: Tensor, *, gradient: MarginGradient = "exact") -> Tensor:
    """cos(theta - m scaler) - (m + m scaler): additive for low quality, angular for high.

    Args:
        cosines: (N,) cos(theta) of the target classes.
        margin: m.
        scaler: (N,) quality in [-1, 1], see `ada_scaler`; constant in the gradient.
        gradient: see the module.

    Returns:
        (N,) target logits before the scale.

    Source: AdaFace, arXiv:2204.00964, Eq. 9 and 10; the angle is clipped to [1e-3, pi - 1e-3] as there.
    """
    theta = torch.acos(cosines.clamp(-1 + _ADA_EPS, 1 - _ADA_EPS))
    shifted = torch.cos((theta - margin * scaler).clamp(_ADA_EPS, math.pi - _ADA_EPS))
    return _with_gradient(cosines, shifted - (margin + margin * scaler), gradient)


def mag_margins(norms: Tensor, norm_range: tuple[float, float], margin_range: tuple[float, float]) -> Tensor:
    """MagFace's margin, radians: linear in the norm between the two ranges, constant outside; differentiable.

    Source: MagFace, arXiv:2103.06627, and its released code.
    """
    low, high = norm_range
    first, last = margin_range
    return first + (last - first) / (high - low) * (norms.clamp(low, high) - low)


def mag_regulariser(norms: Tensor, norm_range: tuple[float, float]) -> Tensor:
    """MagFace's g(a) = 1 / a + a / u_a^2 of norms clipped to [l_a, u_a]; falls up to u_a. Differentiable.

    Source: MagFace, arXiv:2103.06627, and its released code.
    """
    low, high = norm_range
    clipped = norms.clamp(low, high)
    return 1 / clipped + clipped / high**2


def _sines(cosines: Tensor) -> Tensor:
    sin2 = 1 - cosines.square()
    return sin2.clamp_min(_MIN_SIN2).sqrt()


def _with_gradient(cosines: Tensor, target: Tensor, gradient: MarginGradient) -> Tensor:
    if gradient == "exact":
        return target
    return cosines + (target - cosines).detach()
