"""Collectives that are also right with one process and no process group."""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from aroface.errors import ArofaceError
from aroface.later import Later

__all__ = [
    "AnyRankLater",
    "all_gather_rows",
    "all_reduce",
    "any_rank",
    "any_rank_each",
    "barrier",
    "from_first_rank",
    "is_distributed",
    "limit_waiting",
    "peer_failure",
    "rank",
    "share_out",
    "world_size",
]


_T = TypeVar("_T")


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
    return any_rank_each([condition])[0]


def any_rank_each(conditions: Sequence[bool]) -> tuple[bool, ...]:
    """For each condition whether it holds on at least one rank. One collective, whatever their number."""
    if not is_distributed():
        return tuple(conditions)
    return tuple(value > 0 for value in _most(conditions).tolist())


class AnyRankLater:
    """`any_rank_each` for every step of a training: answers with what held at the call before, and waits for no GPU."""

    def __init__(self) -> None:
        self._before: Later | None = None

    def __call__(self, conditions: Sequence[bool]) -> tuple[bool, ...]:
        """For each condition whether it held on at least one rank at the call before; all ranks call it."""
        before, self._before = self._before, Later(_most(conditions))
        return tuple(value > 0 for value in before.read()) if before else (False,) * len(conditions)


def _most(conditions: Sequence[bool]) -> Tensor:
    """1 for a condition that holds on at least one rank, else 0."""
    device = _collective_device() if is_distributed() else torch.device("cpu")
    # Pinned, or the copy to a GPU would wait for it.
    values = torch.tensor([float(condition) for condition in conditions], pin_memory=device.type == "cuda")
    return all_reduce(values.to(device, non_blocking=True), "max")


def _collective_device() -> torch.device:
    """Where the process group wants its tensors."""
    is_nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def share_out(rows: NDArray[np.float32], total: int) -> NDArray[np.float32]:
    """Rows that were made by turns, put together: rank r of W gives rows r, r + W, ... of `total`, in order.

    Args:
        rows: (ceil((total - r) / W), D) of this rank.
        total: N, the same on all ranks.

    Returns:
        (N, D), the same on all ranks. A collective.
    """
    if not is_distributed():
        return rows
    ranks = distributed.get_world_size()
    most = -(-total // ranks)
    padded = torch.zeros(most, rows.shape[1], device=_collective_device())
    padded[: len(rows)] = torch.from_numpy(rows)
    gathered = padded.new_empty((ranks * most, rows.shape[1]))
    distributed.all_gather_into_tensor(gathered, padded)
    by_turns = gathered.view(ranks, most, -1).transpose(0, 1).reshape(ranks * most, -1)
    result: NDArray[np.float32] = by_turns[:total].cpu().numpy()
    return result


def peer_failure(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer, rather than that something is wrong here."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Timed out")
    )


def from_first_rank(choose: Callable[[], _T]) -> _T:
    """What `choose` gives on rank 0, on all ranks; an ArofaceError that it raises there is raised on all. A collective.

    The answer travels by pickle, among processes of one job.
    """
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = choose()
        except ArofaceError as error:
            answer[1] = error
    if is_distributed():
        distributed.broadcast_object_list(answer, src=0, device=_collective_device())
    if answer[1] is not None:
        raise answer[1]
    chosen: _T = answer[0]
    return chosen


def limit_waiting(group: ProcessGroup, timeout_s: float) -> None:
    """Let collectives of a group that somebody else has made wait for other ranks no longer than this."""
    distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


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
            total = total.clone()  # autograd may have handed this gradient to others as well
            distributed.all_reduce(total)
            mine.copy_(total[distributed.get_rank() * rows :][:rows])
        else:
            distributed.reduce_scatter_tensor(mine, total)
        return mine.mul_(ctx.scale), None
