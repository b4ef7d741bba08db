"""The last layers of a backbone, whose sums run over all features of an image: always in fp32 or better."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Fp32BatchNorm1d", "Fp32Linear", "in_fp32"]

_HALF = (torch.float16, torch.bfloat16)


def _not_below_fp32(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        return tensor.to(changed.device) if changed.dtype in _HALF else changed

    return keep


class Fp32Linear(nn.Linear):
    """`nn.Linear` that `.half()` and `.bfloat16()` leave in fp32, as fp16 sums of 25,088 terms overflow at 65,504."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(_not_below_fp32(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class Fp32BatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` that `.half()` and `.bfloat16()` leave in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(_not_below_fp32(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def in_fp32(features: Tensor, *layers: nn.Module) -> Tensor:
    """Run `layers` one after the other outside of autocast, in the precision of the first one's weights.

    Args:
        features: (B, F) of any float type.
        layers: `Fp32Linear` first.

    Returns:
        (B, D) in the type of the weights, at least fp32.
    """
    weight: Any = layers[0].weight
    x = features.to(weight.dtype)
    kind = features.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # which has no autocast
        for layer in layers:
            x = layer(x)
    return x
