"""PReLU whose CPU kernels run over long rows: `torch.nn.PReLU` by value and by name, several times faster.

The ATen kernel walks a channels-last activation in runs of C elements, which for the 16 to 64 channels of the first
stages is too short to vectorise. Here the activation is viewed as rows of about a thousand elements, the slopes are
repeated to that length, and every pass is a plain vector operation.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PReLU"]

_ROW_ELEMENTS = 1024
#: Activations of up to so many elements stay in the cache from one pass to the next; of larger ones, blocks do.
_CACHED_ELEMENTS, _BLOCK_ELEMENTS = 2**22, 2**17


class PReLU(nn.PReLU):
    """`max(x, 0) + weight * min(x, 0)` with one slope per channel, (B, C, H, W) -> same.

    On CPU, while gradients are recorded and outside of tracing, it uses `_RowwisePReLU`; elsewhere PyTorch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        rowwise = (
            x.device.type == "cpu"
            and x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.compiler.is_compiling()
            and not torch.onnx.is_in_onnx_export()
        )
        if not rowwise:
            return nn.functional.prelu(x, self.weight.to(x.dtype))
        result: Tensor = _RowwisePReLU.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


def _rows(x: Tensor) -> Tensor:
    """View (B, C, H, W), channels last, as (rows, C * repeats)."""
    flat = x.permute(0, 2, 3, 1)
    width = x.shape[1]
    while width < _ROW_ELEMENTS and flat.numel() % (2 * width) == 0:
        width *= 2
    return flat.reshape(-1, width)


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


class _RowwisePReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = _rows(x)
        ctx.save_for_backward(x, weight)
        return _unrows(nn.functional.prelu(rows, _slopes(weight, x, rows)), x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = _rows(x)
        grad = _rows(grad_outputs[0].contiguous(memory_format=torch.channels_last))
        slopes = _slopes(weight, x, rows)
        grad_rows, sums = torch.empty_like(grad), weight.new_zeros(rows.shape[1])
        # What is too large for the cache goes through it block by block, instead of five times from end to end.
        block = max(1, _BLOCK_ELEMENTS // rows.shape[1]) if rows.numel() > _CACHED_ELEMENTS else len(rows)
        for values, upstream, out in zip(*(torch.split(part, block) for part in (rows, grad, grad_rows)), strict=True):
            positive = torch.ops.aten.threshold_backward(upstream, values, 0)
            negative = upstream - positive
            torch.addcmul(positive, negative, slopes, out=out)
            if ctx.needs_input_grad[1]:
                # A product with ones sums the rows in fp32 accumulators, at the speed of a matrix product.
                sums += (grad.new_ones(1, len(values)) @ negative.mul_(values))[0]
        grad_weight = sums.view(-1, x.shape[1]).sum(0) if ctx.needs_input_grad[1] else None
        return _unrows(grad_rows, x), grad_weight


def _slopes(weight: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """The slopes as often as a row holds the channels."""
    return weight.to(x.dtype).repeat(rows.shape[1] // x.shape[1])
