"""Collectives that are also right with one process and no process group."""

import os
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["all_gather_rows", "all_reduce", "any_rank", "barrier", "is_distributed", "rank", "world_size"]


def is_distributed() -> bool:
    """Whether a process group with more than one rank is up."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Index of this process: of the process group, else of the launcher's environment, else 0."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def all_reduce(value: Tensor, operation: str = "sum") -> Tensor:
    """Element-wise sum or max over ranks, in place; returns `value`. Not differentiable."""
    if is_distributed():
        operations = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}
        distributed.all_reduce(value, op=operations[operation])
    return value


def any_rank(condition: bool) -> bool:
    """Whether `condition` holds on at least one rank. A collective: all ranks call it."""
    if not is_distributed():
        return condition
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
    return bool(all_reduce(torch.tensor(float(condition), device=device), "max").item())


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        distributed.barrier()


def all_gather_rows(rows: Tensor, *, gradient_scale: float = 1.0) -> Tensor:
    """(B, ...) of every rank, in rank order, as (W B, ...); B is the same on all ranks.

    The backward pass sums the gradient over ranks, hands each rank its rows, and multiplies by `gradient_scale`: the
    world size where the backbone's gradients are then averaged over ranks (DeepSpeed, DDP), for the loss is already a
    mean over the global batch.
    """
    if not is_distributed():
        return rows
    gathered: Tensor = _AllGatherRows.apply(rows, gradient_scale)  # type: ignore[no-untyped-call]
    return gathered


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient_scale: float) -> Tensor:
        ctx.scale = gradient_scale
        ranks = distributed.get_world_size()
        gathered = rows.new_empty((ranks * len(rows), *rows.shape[1:]))
        distributed.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].contiguous()
        rows = len(total) // distributed.get_world_size()
        mine = total.new_empty((rows, *total.shape[1:]))
        if distributed.get_backend() == "gloo":  # gloo has no reduce_scatter for every build
            distributed.all_reduce(total)
            mine.copy_(total[distributed.get_rank() * rows :][:rows])
        else:
            distributed.reduce_scatter_tensor(mine, total)
        return mine.mul_(ctx.scale), None
