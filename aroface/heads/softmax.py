"""Softmax over the local classes, in chunks: the (N, C) logits never exist at one time.

Legend: N rows of the global batch, C local classes, D embedding dimension, K classes of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aroface.heads.negatives import NegativeRule
from aroface.heads.products import LogitPrecision, cosines_of, operand, product

__all__ = [
    "MIN_LENGTH",
    "SoftmaxSettings",
    "add_target_gradient",
    "class_terms",
    "plain_terms",
    "target_cosines",
    "through_length",
    "unit_rows",
]

#: Shorter rows count as rows of this length.
MIN_LENGTH = 1e-12


@dataclass(frozen=True)
class SoftmaxSettings:
    """How the terms are formed."""

    logit_scale: float  #: s
    chunk_classes: int  #: K, columns that exist at one time; does not change the result beyond rounding
    precision: LogitPrecision = "fp32"  #: of the products with the class centres
    rule: NegativeRule | None = None  #: what becomes of the negatives; None: nothing


def class_terms(
    embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings
) -> tuple[Tensor, Tensor]:
    """What the local classes contribute to the loss of every row.

    Args:
        embeddings: (N, D) float32, unit length.
        weights: (C, D) float32 class centres, of any length; normalised here, chunk by chunk.
        targets: (N,) int64 local index of each row's class, -1 where another rank has it.
        settings: see there.

    Returns:
        log sum_{j != target} exp(s phi(cos_ij)) over local classes, (N,), -inf for a row whose target is the only local
        class; and the cosine of the target, (N,), 0 where another rank has it. Both float32 and differentiable in
        embeddings and weights; the backward pass computes each chunk again unless there is only one.
    """
    terms: tuple[Tensor, Tensor] = _ClassTerms.apply(  # type: ignore[no-untyped-call]
        embeddings, weights, targets, settings
    )
    return terms


def plain_terms(
    embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings
) -> tuple[Tensor, Tensor]:
    """`class_terms` as it is written in the formula, in fp32 and by plain autograd: all logits exist at one time."""
    cosines = embeddings @ (weights / weights.norm(dim=1, keepdim=True).clamp_min(MIN_LENGTH)).T
    logits = settings.logit_scale * (settings.rule(cosines)[0] if settings.rule else cosines)
    is_target = torch.arange(len(weights), device=targets.device) == targets[:, None]
    negatives = logits.masked_fill(is_target, -torch.inf)
    is_empty = is_target.all(1)  # no negative at all: the value -inf and no gradient
    total = torch.where(is_empty, -torch.inf, negatives.masked_fill(is_empty[:, None], 0).logsumexp(1))
    return total, target_cosines(embeddings, weights, targets)


def target_cosines(embeddings: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """The second result of `class_terms` alone, by plain autograd."""
    own, _ = _target_centres(weights, targets)
    return torch.where(targets >= 0, (embeddings * own).sum(1), 0.0)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows at unit length; a zero row stays zero."""
    return nn.functional.normalize(rows, dim=1, eps=MIN_LENGTH)


def _target_centres(weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Unit centres (N, D) and their lengths (N, 1) of every row's class; of class 0 where another rank has it."""
    own = weights[targets.clamp_min(0)]
    lengths = own.norm(dim=1, keepdim=True).clamp_min(MIN_LENGTH)
    return own / lengths, lengths


@dataclass(frozen=True)
class _Chunk:
    logits: Tensor  #: (N, K), -inf at the targets
    slopes: Tensor | None  #: (N, K) d phi / d cos; None: 1
    unit: Tensor  #: (K, D) centres at unit length
    lengths: Tensor  #: (K, 1) of the centres before


def _chunk(embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings, start: int) -> _Chunk:
    weights = weights[start : start + settings.chunk_classes]
    lengths = weights.norm(dim=1, keepdim=True).clamp_min(MIN_LENGTH)
    unit = weights / lengths
    slopes = None
    if settings.rule:
        logits, slopes = settings.rule(cosines_of(embeddings, unit, settings.precision))
        logits *= settings.logit_scale
    else:
        logits = cosines_of(settings.logit_scale * embeddings, unit, settings.precision)  # saves a pass over (N, K)
    column = targets - start
    is_inside = (column >= 0) & (column < len(weights))
    column = column.clamp(0, len(weights) - 1)[:, None]
    logits.scatter_(1, column, torch.where(is_inside[:, None], -torch.inf, logits.gather(1, column)))
    return _Chunk(logits, slopes, unit, lengths)


class _ClassTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings
    ) -> tuple[Tensor, Tensor]:
        total = embeddings.new_full((len(embeddings),), -torch.inf)
        ctx.kept = None
        for start in range(0, len(weights), settings.chunk_classes):
            chunk = _chunk(embeddings, weights, targets, settings, start)
            if settings.chunk_classes >= len(weights):
                ctx.kept = chunk
                total = chunk.logits.logsumexp(1)
            else:
                total = torch.logaddexp(total, _logsumexp_(chunk.logits))
        ctx.save_for_backward(embeddings, weights, targets, total)
        ctx.settings = settings
        return total, target_cosines(embeddings, weights, targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        # A caller may form gradients inside of autocast too, whose products would be those of half precision.
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return *_ClassTerms._gradients(ctx, *grad_outputs), None, None

    @staticmethod
    def _gradients(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings, weights, targets, total = ctx.saved_tensors
        settings: SoftmaxSettings = ctx.settings
        # Rows without a single negative have the value -inf and no gradient.
        is_empty = total == -torch.inf
        finite = total.masked_fill(is_empty, 0)[:, None]
        factor = (grad_outputs[0] * settings.logit_scale).masked_fill(is_empty, 0)[:, None]
        grad_embeddings = torch.zeros_like(embeddings)
        grad_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        weighted = operand(embeddings * factor, settings.precision)
        for start in range(0, len(weights), settings.chunk_classes):
            chunk = ctx.kept or _chunk(embeddings, weights, targets, settings, start)
            shares = (chunk.logits - finite) if ctx.kept else chunk.logits.sub_(finite)
            shares.exp_()
            if chunk.slopes is not None:
                shares *= chunk.slopes
            shares = operand(shares, settings.precision)
            grad_embeddings += product(shares, operand(chunk.unit, settings.precision))
            if grad_weights is not None:
                out = grad_weights[start : start + len(chunk.unit)]
                through_length(product(shares.T, weighted), chunk.unit, chunk.lengths, out=out)
        grad_embeddings *= factor
        add_target_gradient(embeddings, weights, targets, grad_outputs[1], grad_embeddings, grad_weights)
        return grad_embeddings, grad_weights


def _logsumexp_(logits: Tensor) -> Tensor:
    """`logits.logsumexp(1)`, overwriting its argument: faster than ATen's on a CPU."""
    top = logits.amax(1)
    shift = top.masked_fill(top == -torch.inf, 0)
    return logits.sub_(shift[:, None]).exp_().sum(1).log_().add_(shift)


def through_length(grad_unit: Tensor, unit: Tensor, lengths: Tensor, *, out: Tensor) -> None:
    """Gradient of centres from the gradient of the same at unit length."""
    radial = (grad_unit * unit).sum(1, keepdim=True)
    torch.addcmul(grad_unit, unit, radial, value=-1, out=out).div_(lengths)


def add_target_gradient(
    embeddings: Tensor,
    weights: Tensor,
    targets: Tensor,
    grad_cosines: Tensor,
    grad_embeddings: Tensor,
    grad_weights: Tensor | None,
) -> None:
    """Add the gradient of the target cosines to both."""
    unit, lengths = _target_centres(weights, targets)
    grad_cosines = grad_cosines.masked_fill(targets < 0, 0)[:, None]
    grad_embeddings += grad_cosines * unit
    if grad_weights is not None:
        grad_own = torch.empty_like(unit)
        through_length(grad_cosines * embeddings, unit, lengths, out=grad_own)
        # A row whose class another rank has adds nothing, anywhere: not all at one place, where they would queue.
        elsewhere = torch.arange(len(targets), device=targets.device) % len(weights)
        place = torch.where(targets < 0, elsewhere, targets)
        if grad_weights.is_cuda:  # index_add_ adds the rows of one class in the order in which they happen to arrive
            grad_weights.index_put_((place,), grad_own, accumulate=True)
        else:  # as would index_put_ on a CPU
            grad_weights.index_add_(0, place, grad_own)
