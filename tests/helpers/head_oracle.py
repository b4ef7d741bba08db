"""The heads once more: float64, every logit written out, no chunks, no ranks; from the papers' formulas."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aroface.config.head import HeadConfig

#: Name -> settings; between them every kind, every continuation and both gradients.
HEADS: dict[str, dict[str, Any]] = {
    "arcface": {"kind": "arcface", "margin": 0.5},
    "arcface-release": {
        "kind": "arcface",
        "margin": 0.5,
        "continuation": "plain",
        "margin_gradient": "straight_through",
    },
    "arcface-linear": {"kind": "arcface", "margin": 0.5, "continuation": "linear"},
    "arcface-filter": {"kind": "arcface", "margin": 0.3, "interclass_filter": 0.25},
    "cosface": {"kind": "cosface", "margin": 0.35},
    "combined": {"kind": "combined", "m1": 1.35, "m2": 0.2, "m3": 0.1},
    "combined-plain": {
        "kind": "combined",
        "m1": 2.0,
        "m2": 0.1,
        "m3": 0.0,
        "continuation": "plain",
        "margin_gradient": "straight_through",
    },
    "adaface": {"kind": "adaface", "margin": 0.4, "statistics_momentum": 0.3},
    "adaface-straight": {"kind": "adaface", "margin": 0.4, "margin_gradient": "straight_through"},
    "curricularface": {"kind": "curricularface", "margin": 0.5, "statistics_momentum": 0.3},
    "curricularface-reflect": {
        "kind": "curricularface",
        "margin": 0.3,
        "continuation": "reflect",
        "margin_gradient": "straight_through",
    },
    "magface": {"kind": "magface", "lower_norm": 3.0, "upper_norm": 12.0, "regulariser_weight": 5.0},
    "magface-linear": {"kind": "magface", "lower_norm": 3.0, "upper_norm": 12.0, "continuation": "linear"},
}


def updated_statistics(
    config: HeadConfig, statistics: Mapping[str, float], embeddings: Tensor, weights: Tensor, labels: Tensor
) -> dict[str, float]:
    """Running statistics after one more batch; one image has no spread and leaves that as it is."""
    if config.kind == "adaface":
        norms = embeddings.norm(dim=1).clip(0.001, 100)
        new = {"norm_mean": norms.mean().item(), "norm_std": norms.std().item() if len(norms) > 1 else math.nan}
    elif config.kind == "curricularface":
        new = {"t": _cosines(embeddings, weights)[range(len(labels)), labels].mean().item()}
    else:
        return {}
    alpha = config.statistics_momentum
    return {
        name: statistics[name] if math.isnan(value) else (1 - alpha) * statistics[name] + alpha * value
        for name, value in new.items()
    }


def oracle_losses(
    config: HeadConfig, statistics: Mapping[str, float], embeddings: Tensor, weights: Tensor, labels: Tensor
) -> Tensor:
    """Loss of every row; float64 in, differentiable."""
    rows = torch.arange(len(labels))
    cosines = _cosines(embeddings, weights)
    target, norms = cosines[rows, labels], embeddings.norm(dim=1)
    extra = torch.zeros_like(norms)
    theta = torch.acos(target)
    match config.kind:
        case "arcface":
            shifted = _angular(theta, torch.full_like(theta, config.margin), config.continuation)
        case "cosface":
            shifted = target - config.margin
        case "combined":
            angle = config.m1 * theta + config.m2
            fold = _fold(angle) if config.continuation == "reflect" else torch.cos(angle)
            shifted = fold - config.m3
        case "adaface":
            quality = (norms.detach().clip(0.001, 100) - statistics["norm_mean"]) / (statistics["norm_std"] + 1e-3)
            quality = (quality * config.h).clip(-1, 1)
            angle = torch.acos(target.clip(-1 + 1e-3, 1 - 1e-3)) - config.margin * quality
            shifted = torch.cos(angle.clip(1e-3, math.pi - 1e-3)) - config.margin - config.margin * quality
        case "curricularface":
            margin = torch.full_like(theta, config.margin)
            shifted = _angular(theta, margin, config.continuation)
            is_hard = cosines.detach() > torch.cos(theta + margin).detach()[:, None]
            cosines = torch.where(is_hard, cosines * (statistics["t"] + cosines), cosines)
        case "magface":
            size = norms.clip(config.lower_norm, config.upper_norm)
            slope = (config.upper_margin - config.lower_margin) / (config.upper_norm - config.lower_norm)
            shifted = _angular(theta, slope * (size - config.lower_norm) + config.lower_margin, config.continuation)
            extra = config.regulariser_weight * (size / config.upper_norm**2 + 1 / size)
    if getattr(config, "interclass_filter", None):
        cosines = torch.where(cosines > config.interclass_filter, 0.0, cosines)
    if config.margin_gradient == "straight_through":
        shifted = shifted.detach() + target - target.detach()
    logits = config.logit_scale * cosines.index_put((rows, labels), shifted)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none") + extra


def _cosines(embeddings: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(weights).T


def _angular(theta: Tensor, margin: Tensor, continuation: str) -> Tensor:
    shifted = torch.cos(theta + margin)
    match continuation:
        case "reflect":
            return _fold(theta + margin)
        case "linear":
            return torch.where(theta + margin > math.pi, torch.cos(theta) - margin * torch.sin(margin), shifted)
        case "easy":
            return torch.where(theta < math.pi / 2, shifted, torch.cos(theta))
    return shifted


def _fold(angle: Tensor) -> Tensor:
    """SphereFace's psi: the cosine that goes on falling, half a wave at a time."""
    folded = []
    for value in angle:
        half_waves = int(value.item() // math.pi)
        folded.append((-1) ** half_waves * torch.cos(value) - 2 * half_waves)
    return torch.stack(folded)
