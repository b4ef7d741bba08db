"""Batch norm in training with what follows it, a PReLU or the sum of a residual, in as few passes as there can be.

PyTorch runs batch norm, PReLU and sum one after the other, each reading and writing the whole activation, and its
statistics on a GPU are far from the speed of the memory. Fused, a batch norm with a PReLU reads the activation twice
and writes once in the forward pass; in the backward pass it reads gradient and activation twice and writes once. That
is what is left of 7 and 16 passes. Where the input also goes past the norm, the gradient of that skip is added as the
norm's own is written.

With running averages, in an attack that uses them, one pass does it each way: nothing is summed that nobody wants.

The kernels are Triton's. They run on NVIDIA GPUs for channels-last activations where gradients are wanted; everywhere
else, and where Triton does not work, PyTorch's own operations do the same.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aroface.triton_runtime import is_interpreted, multiprocessors

__all__ = ["forked_norm", "fuse_norms", "norm"]

logger = logging.getLogger(__name__)

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Elements of a tile of the passes that write, and of those that only sum; its largest width and its warps.
_TILE, _TILE_OF_SUMS, _MOST_CHANNELS, _WARPS = 4096, 2048, 128, 8
#: Programs that share out the rows of a sum, for each SM: as many as its registers hold, fewer where there is a PReLU.
_PROGRAMS, _PROGRAMS_WITH_SLOPES = 4, 2
#: Tiles of a sum that are read ahead, and the one at work; fewest tiles that are worth a part of a sum.
_STAGES, _LEAST_TILES = 4, 4
#: Most parts, and the channels (32 bytes), that one program adds up at once.
_MOST_PARTS, _CHANNELS_OF_TOTAL = 1024, 8


def norm(module: nn.Module, x: Tensor, *, prelu: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """`prelu(module(x)) + residual`.

    Args:
        module: batch norm; its running statistics are updated as by a call.
        x: (B, C, H, W).
        prelu: PReLU with C slopes; None: nothing.
        residual: (B, C, H, W); None: nothing.

    Returns:
        (B, C, H, W) in the type of `x`; the fused path rounds once, PyTorch after each operation.
    """
    if _fits(module, x, prelu, residual) and _works(x.device):
        slope = None if prelu is None else prelu.weight
        fused: Tensor = _FusedNorm.apply(  # type: ignore[no-untyped-call]
            x, module.weight, module.bias, slope, residual, module, False
        )
        return fused
    y: Tensor = module(x)
    if prelu is not None:
        y = prelu(y)
    return y if residual is None else y + residual


def forked_norm(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`module(x)`, and `x` for what runs beside it: the skip of a residual block.

    Fused, the gradients of both are added as the norm's is formed, and not in a pass of their own.

    Args:
        module: batch norm; its running statistics are updated as by a call.
        x: (B, C, H, W).

    Returns:
        Two of (B, C, H, W); use the second in place of `x`.
    """
    if _fits(module, x, None, None) and _works(x.device):
        y, skip = _FusedNorm.apply(  # type: ignore[no-untyped-call]
            x, module.weight, module.bias, None, None, module, True
        )
        return y, skip
    return module(x), x


def fuse_norms(backbone: nn.Module, *, is_wanted: bool) -> None:
    """Let the batch norms of a backbone run fused where they can (as they do if this is not called), or never."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.is_never_fused = not is_wanted  # type: ignore[assignment]


def _fits(module: nn.Module, x: Tensor, prelu: nn.Module | None, residual: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and (x.is_cuda or is_interpreted())
        and type(module) is nn.BatchNorm2d  # none that is synchronised between ranks
        and _has_statistics(module, x)
        and not getattr(module, "is_never_fused", False)
        and x.dtype in _TYPES
        and x.is_contiguous(memory_format=torch.channels_last)
        and len(x) * x.shape[2] * x.shape[3] > 1  # PyTorch says what is wrong with less
        and _is_at_hand(module.weight, x)
        and (prelu is None or _has_slopes(prelu, x))
        and (
            residual is None
            or (residual.dtype == x.dtype and residual.is_contiguous(memory_format=torch.channels_last))
        )
    )  # fmt: skip


def _has_statistics(module: nn.BatchNorm2d, x: Tensor) -> bool:
    """Of the batch, or the running averages where gradients are wanted: an attack, or a run with frozen norms."""
    if module.training:
        return module.momentum is not None
    return torch.is_grad_enabled() and _is_at_hand(module.running_mean, x) and _is_at_hand(module.running_var, x)


def _has_slopes(prelu: nn.Module, x: Tensor) -> bool:
    return isinstance(prelu, nn.PReLU) and prelu.num_parameters == x.shape[1] and _is_at_hand(prelu.weight, x)


def _is_at_hand(weight: Tensor | None, x: Tensor) -> bool:
    """Whether it is there, in fp32, and not partitioned by DeepSpeed, which gathers it when its module is called."""
    if weight is None or hasattr(weight, "ds_id"):
        return False
    return weight.dtype == torch.float32 and weight.device == x.device


@functools.cache
def _works(device: torch.device) -> bool:
    """Try the kernels once; where they fail, such as without a C compiler, say so and leave them alone."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(2, 8, 2, 2, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
            module = nn.BatchNorm2d(8, device=device)
            y = _FusedNorm.apply(  # type: ignore[no-untyped-call]
                x, module.weight, module.bias, None, None, module, False
            )
            torch.autograd.grad(y.sum(), x)
    except Exception as error:  # Triton and the compilers behind it raise of every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        logger.warning("Batch norms run as PyTorch's own operations, slower: Triton's kernels failed (%s).", reason)
        return False
    return True


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: Tensor | None,
        residual: Tensor | None,
        module: nn.BatchNorm2d,
        is_forked: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from aroface.models import norm_kernels

        rows, channels = x.numel() // x.shape[1], x.shape[1]
        found = _batch_statistics(x, module) if module.training else _running_statistics(module)
        y, tile = torch.empty_like(x), _tile(channels, _TILE)
        norm_kernels.normalise_rows[(_tiles(rows, tile[0]) * _tiles(channels, tile[1]),)](
            x, found, weight, bias, weight if slope is None else slope, x if residual is None else residual, y,
            rows, channels, *tile, slope is not None, residual is not None, num_warps=_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, slope, found)
        ctx.is_frozen = not module.training
        return (y, x) if is_forked else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_skip: Tensor | None = None) -> tuple[Tensor | None, ...]:
        from aroface.models import norm_kernels

        x, weight, bias, slope, found = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_skip = None if of_skip is None else of_skip.contiguous(memory_format=torch.channels_last)
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        slopes = weight if slope is None else slope
        sums = None
        # In an attack weights are constants; through the statistics of a batch the input depends on the sums too.
        if not ctx.is_frozen or any(ctx.needs_input_grad[1:4]):
            sums = _gradient_sums(ctx, gradient)
        result, tile = torch.empty_like(x), _tile(channels, _TILE)
        norm_kernels.gradient_of_input[(_tiles(rows, tile[0]) * _tiles(channels, tile[1]),)](
            gradient, x, found, weight, bias, slopes, found if sums is None else sums,
            gradient if of_skip is None else of_skip, result,
            rows, channels, *tile, slope is not None, of_skip is not None, ctx.is_frozen, num_warps=_WARPS,
        )  # fmt: skip
        of_bias, of_weight, of_slope = (None, None, None) if sums is None else (*sums, None)[:3]
        return result, of_weight, of_bias, of_slope, gradient if ctx.needs_input_grad[4] else None, None, None


def _batch_statistics(x: Tensor, module: nn.BatchNorm2d) -> Tensor:
    """(2, C) mean and 1 / deviation of the batch, taken into the running averages if there are any."""
    from aroface.models import norm_kernels

    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile = _tile(channels, _TILE_OF_SUMS)
    parts = _parts(rows, channels, tile, _PROGRAMS * multiprocessors(x.device))
    partial = module.weight.new_empty((2, parts, channels))
    norm_kernels.column_sums[(parts, _tiles(channels, tile[1]))](
        x, partial, rows, channels, *tile, _STAGES, num_warps=_WARPS
    )
    found = module.weight.new_empty((2, channels))
    is_recorded = module.track_running_stats and module.running_mean is not None
    running = (module.running_mean, module.running_var, module.num_batches_tracked) if is_recorded else (found,) * 3
    tile_of_parts = _tile_of_parts(parts)
    norm_kernels.statistics[(_tiles(channels, tile_of_parts[1]),)](
        x, partial, found, *running, rows, channels, parts, module.eps, module.momentum,
        *tile_of_parts, is_recorded, num_warps=_WARPS,
    )  # fmt: skip
    return found


def _running_statistics(module: nn.BatchNorm2d) -> Tensor:
    """(2, C) mean and 1 / deviation of the running averages."""
    from aroface.models import norm_kernels

    channels = module.num_features
    found = module.weight.new_empty((2, channels))
    norm_kernels.running_statistics[(_tiles(channels, _MOST_CHANNELS),)](
        module.running_mean, module.running_var, found, channels, module.eps, _MOST_CHANNELS, num_warps=1
    )
    return found


def _gradient_sums(ctx: Any, gradient: Tensor) -> Tensor:
    """(2 or 3, C) gradients of bias, weight and, if wanted, slope."""
    from aroface.models import norm_kernels

    x, weight, bias, slope, found = ctx.saved_tensors
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile = _tile(channels, _TILE_OF_SUMS)
    programs = _PROGRAMS if slope is None else _PROGRAMS_WITH_SLOPES
    parts = _parts(rows, channels, tile, programs * multiprocessors(x.device))
    wants_slope = ctx.needs_input_grad[3]
    partial = weight.new_empty((3 if wants_slope else 2, parts, channels))
    norm_kernels.gradient_columns[(parts, _tiles(channels, tile[1]))](
        gradient, x, found, weight, bias, weight if slope is None else slope, partial, rows, channels,
        *tile, _STAGES, slope is not None, wants_slope, num_warps=_WARPS,
    )  # fmt: skip
    sums = weight.new_empty((len(partial), channels))
    tile_of_parts = _tile_of_parts(parts)
    norm_kernels.totals[(_tiles(channels, tile_of_parts[1]), len(partial))](
        partial, sums, parts, channels, *tile_of_parts, num_warps=_WARPS
    )
    return sums  # type: ignore[no-any-return]


def _tile(channels: int, elements: int) -> tuple[int, int]:
    """Rows and channels of a tile; powers of two."""
    columns = min(_MOST_CHANNELS, 1 << (channels - 1).bit_length())
    return elements // columns, columns


def _tile_of_parts(parts: int) -> tuple[int, int]:
    """Parts and channels that one program adds up at once: all parts of an H200, so that it waits for memory once."""
    return min(_MOST_PARTS, 1 << (parts - 1).bit_length()), _CHANNELS_OF_TOTAL


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _parts(rows: int, channels: int, tile: tuple[int, int], programs: int) -> int:
    """Into how many parts the rows are shared out, so that all tiles across keep `programs` busy."""
    tiles = _tiles(rows, tile[0])
    return max(1, min(programs // _tiles(channels, tile[1]), tiles // _LEAST_TILES))
