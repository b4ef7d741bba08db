"""log-sum-exp over the local classes, in chunks: the (N, C) logits never exist at one time.

Legend: N rows of the global batch, C local classes, D embedding dimension, K classes of a chunk.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from aroface.distributed import is_distributed

__all__ = ["gather_terms", "negatives_logsumexp"]


def negatives_logsumexp(
    embeddings: Tensor, weights: Tensor, targets: Tensor, *, logit_scale: float, chunk_classes: int
) -> Tensor:
    """The value log sum_{j != target} exp(s cos_ij) over local classes, for every row.

    Args:
        embeddings: (N, D) float32, unit length.
        weights: (C, D) float32 class centres, of any length; normalised here, chunk by chunk.
        targets: (N,) int64 local index of each row's class, -1 where another rank has it.
        logit_scale: s.
        chunk_classes: K, columns that exist at one time; does not change the result beyond rounding.

    Returns:
        (N,) float32; -inf for a row whose target is the only local class. Differentiable in embeddings and weights; the
        backward pass computes each chunk again unless there is only one.
    """
    result: Tensor = _NegativesLogSumExp.apply(  # type: ignore[no-untyped-call]
        embeddings, weights, targets, logit_scale, chunk_classes
    )
    return result


def _chunk_logits(
    embeddings: Tensor, weights: Tensor, targets: Tensor, scale: float, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled cosines (N, K) with -inf at the targets, unit weights (K, D) and lengths (K, 1)."""
    lengths = weights[start:stop].norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = weights[start:stop] / lengths
    logits = embeddings @ unit.T
    logits *= scale
    inside = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
    logits[inside, targets[inside] - start] = -torch.inf
    return logits, unit, lengths


class _NegativesLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weights: Tensor, targets: Tensor, scale: float, chunk: int) -> Tensor:
        total = embeddings.new_full((len(embeddings),), -torch.inf)
        ctx.kept = None
        for start in range(0, len(weights), chunk):
            stop = min(start + chunk, len(weights))
            parts = _chunk_logits(embeddings, weights, targets, scale, start, stop)
            total = torch.logaddexp(total, parts[0].logsumexp(1))
            if start == 0 and stop == len(weights):
                ctx.kept = parts
        ctx.save_for_backward(embeddings, weights, targets, total)
        ctx.scale, ctx.chunk = scale, chunk
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        embeddings, weights, targets, total = ctx.saved_tensors
        # Rows without a single negative have the value -inf and no gradient.
        finite = total.masked_fill(total == -torch.inf, 0)
        factor = (grad_outputs[0] * ctx.scale).masked_fill(total == -torch.inf, 0)[:, None]
        grad_embeddings = torch.zeros_like(embeddings)
        grad_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weights), ctx.chunk):
            stop = min(start + ctx.chunk, len(weights))
            logits, unit, lengths = ctx.kept or _chunk_logits(embeddings, weights, targets, ctx.scale, start, stop)
            grad_logits = (logits - finite[:, None]).exp_().mul_(factor)
            grad_embeddings.addmm_(grad_logits, unit)
            if grad_weights is not None:
                grad_unit = grad_logits.T @ embeddings
                radial = (grad_unit * unit).sum(1, keepdim=True)
                torch.div(grad_unit - unit * radial, lengths, out=grad_weights[start:stop])
        return grad_embeddings, grad_weights, None, None, None


def gather_terms(terms: Tensor) -> Tensor:
    """(2, N) of every rank as (W, 2, N); the gradient of a rank's own entries comes back to it alone.

    Every rank forms the same loss from the same gathered terms, so its own derivative is already the whole one.
    """
    if not is_distributed():
        return terms[None]
    gathered: Tensor = _GatherTerms.apply(terms)  # type: ignore[no-untyped-call]
    return gathered


class _GatherTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor) -> Tensor:
        ranks = distributed.get_world_size()
        gathered = terms.new_empty((ranks * len(terms), terms.shape[1]))
        distributed.all_gather_into_tensor(gathered, terms.contiguous())
        return gathered.view(ranks, *terms.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0][distributed.get_rank()]


def unit_rows(rows: Tensor) -> Tensor:
    """Rows at unit length; a zero row stays zero."""
    return nn.functional.normalize(rows, dim=1, eps=1e-12)
