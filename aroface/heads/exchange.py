"""What ranks tell each other: embeddings with labels once, the terms of the softmax once, and gradients back.

Legend: B images of a rank, N of the global batch, D embedding dimension, W ranks.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from aroface.distributed import all_gather_rows, all_reduce, is_distributed

__all__ = ["gather_batch", "own_rows", "sum_over_ranks"]


def gather_batch(embeddings: Tensor, labels: Tensor, *, gradient_scale: float) -> tuple[Tensor, Tensor]:
    """(B, D) float32 embeddings and (B,) labels of every rank, in rank order, by one exchange.

    The labels travel as the bits of one more column. The gradient of the embeddings is summed over ranks and multiplied
    by `gradient_scale`, see `all_gather_rows`.
    """
    if not is_distributed():
        return embeddings, labels
    bits = labels.to(torch.int32).view(torch.float32)
    gathered = all_gather_rows(torch.cat([embeddings, bits[:, None]], 1), gradient_scale=gradient_scale)
    gathered_labels = gathered.detach()[:, -1].contiguous().view(torch.int32).to(torch.int64)
    return gathered[:, :-1], gathered_labels


def sum_over_ranks(terms: Tensor) -> Tensor:
    """Element-wise sum over ranks; the gradient comes back as it is.

    Every rank forms the same loss from the same sums, so the derivative of its own terms is already the whole one.
    """
    if not is_distributed():
        return terms
    summed: Tensor = _SumOverRanks.apply(terms)  # type: ignore[no-untyped-call]
    return summed


def own_rows(rows: Tensor) -> Tensor:
    """(N,) values that every rank holds to the (B,) of this rank's images.

    The gradients of all ranks are gathered and divided by W, so that means over the own rows, averaged over ranks, have
    the gradient of the mean over all rows.
    """
    if not is_distributed():
        return rows
    own: Tensor = _OwnRows.apply(rows)  # type: ignore[no-untyped-call]
    return own


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor) -> Tensor:
        return all_reduce(terms.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        count = len(rows) // distributed.get_world_size()
        return rows[distributed.get_rank() * count :][:count].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return all_gather_rows(grad_outputs[0].contiguous()) / distributed.get_world_size()
