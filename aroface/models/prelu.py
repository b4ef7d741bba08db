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
        slopes = weight.to(x.dtype).repeat(rows.shape[1] // x.shape[1])
        ctx.save_for_backward(x, weight)
        if bool((weight <= 1).all()):
            return _unrows(torch.maximum(rows, rows * slopes), x)  # the same values in one pass less
        return _unrows(rows.clamp_min(0).addcmul_(rows.clamp_max(0), slopes), x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = _rows(x)
        grad = _rows(grad_outputs[0].contiguous(memory_format=torch.channels_last))
        channels = x.shape[1]
        slopes = weight.to(x.dtype).repeat(rows.shape[1] // channels)
        grad_positive = torch.ops.aten.threshold_backward(grad, rows, 0)
        grad_negative = grad - grad_positive
        grad_x = grad_positive.addcmul_(grad_negative, slopes)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # A product with ones sums the rows in fp32 accumulators, at the speed of a matrix product.
            sums = grad.new_ones(1, len(rows)) @ grad_negative.mul_(rows)
            grad_weight = sums.to(weight.dtype).view(-1, channels).sum(0)
        return _unrows(grad_x, x), grad_weight
