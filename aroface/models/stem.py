"""The convolution of three colours, which cuDNN has no tensor-core kernel for."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["stem"]

#: Half-precision channels in 16 bytes, what a tensor-core kernel loads at once.
_WIDTH = 8


def stem(conv: nn.Module, images: Tensor) -> Tensor:
    """`conv(images)`; under autocast on a GPU in training with the channels filled up with zeros.

    For (512, 3, 112, 112) the forward pass takes half the time, the filling included (docs/results/log.md).

    Args:
        conv: `nn.Conv2d`, the first of a network.
        images: (B, C, H, W).
    """
    # A weight that DeepSpeed has partitioned is gathered when its module is called.
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or hasattr(conv.weight, "ds_id") or not _pays(images):
        features: Tensor = conv(images)
        return features
    dtype = torch.get_autocast_dtype(images.device.type)
    images, weight = (_filled(factor, dtype) for factor in (images, conv.weight))
    return functional.conv2d(images, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def _pays(images: Tensor) -> bool:
    return (
        images.is_cuda
        and torch.is_autocast_enabled(images.device.type)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and images.is_contiguous(memory_format=torch.channels_last)
    )


def _filled(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.pad(factor.to(dtype), (0, 0, 0, 0, 0, -factor.shape[1] % _WIDTH))
