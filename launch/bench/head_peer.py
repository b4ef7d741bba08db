"""The arithmetic of InsightFace's arcface_torch classifier on one device, rebuilt plainly, to be measured beside ours.

PartialFC_V2 with its combined margin at m1 = 1, m3 = 0: all logits at once in float32, cosines clipped, turned into
angles and back in place without gradients, softmax formed in place by a function of its own whose backward pass makes
a one-hot matrix; with sampling, the chosen centres are copied out of the matrix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["peer_loss", "plain_loss"]


def peer_loss(
    embeddings: Tensor, weights: Tensor, labels: Tensor, *, scale: float, margin: float, sample_rate: float = 1.0
) -> Tensor:
    """Mean loss of (N, D) embeddings on (C, D) centres."""
    if sample_rate < 1:
        weights, labels = _sample(weights, labels, sample_rate)
    cosines = functional.linear(functional.normalize(embeddings), functional.normalize(weights)).clamp(-1, 1)
    column = labels[:, None]
    with torch.no_grad():
        angles = cosines.arccos_()
        angles.scatter_add_(1, column, torch.full_like(column, margin, dtype=angles.dtype))
        cosines.cos_()
    loss: Tensor = _InPlaceSoftmax.apply(cosines * scale, column)  # type: ignore[no-untyped-call]
    return loss


def plain_loss(embeddings: Tensor, weights: Tensor, labels: Tensor, *, scale: float, margin: float) -> Tensor:
    """The same loss as PyTorch users write it: dense, by autograd and `cross_entropy`, the margin as a constant."""
    cosines = functional.linear(functional.normalize(embeddings), functional.normalize(weights))
    column = labels[:, None]
    target = cosines.detach().gather(1, column).clamp(-1, 1)
    shift = (target.arccos() + margin).cos() - target
    return functional.cross_entropy(scale * cosines.scatter_add(1, column, shift), labels)


def _sample(weights: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    positives = torch.unique(labels)
    priority = torch.rand(len(weights))
    priority[positives] = 2
    chosen = priority.topk(max(len(positives), int(rate * len(weights)))).indices.sort().values
    return weights[chosen], torch.searchsorted(chosen, labels)


class _InPlaceSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True)).exp_()
        logits.div_(logits.sum(1, keepdim=True))
        ctx.save_for_backward(logits, column)
        return -logits.gather(1, column).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        shares, column = ctx.saved_tensors
        one_hot = torch.zeros_like(shares).scatter_(1, column, 1)
        shares -= one_hot
        shares /= len(shares)
        return shares * grad_outputs[0].item(), None
