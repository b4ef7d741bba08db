"""Matrix products of the head in the precision that a configuration names; results are float32.

`fp32`: as it says. `bf16`: the factors are rounded to bf16, the sums are fp32. Where logits are formed the sum is not
rounded either: bf16 would move the logit of a cosine of 0.6 by up to 0.06 at s = 64, more than rounding the factors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from aroface.bf16 import has_bf16_units

__all__ = ["LogitPrecision", "cosines_of", "operand", "product"]

LogitPrecision = Literal["fp32", "bf16"]


def cosines_of(rows: Tensor, centres: Tensor, precision: LogitPrecision) -> Tensor:
    """Products rows (N, D) @ centres (K, D).T as (N, K) float32, of float32 factors."""
    if precision == "fp32":
        return rows @ centres.T
    if rows.device.type == "cpu":
        with _fast_products():
            return rows @ centres.T
    return torch.mm(rows.bfloat16(), centres.bfloat16().T, out_dtype=torch.float32)


def operand(values: Tensor, precision: LogitPrecision) -> Tensor:
    """A factor for `product`, rounded once for several products."""
    return values.bfloat16() if precision == "bf16" else values


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Product left @ right of two operands as float32, into `out` if there is one.

    On a CPU with units for bf16 the product of bf16 operands is rounded to bf16 before.
    """
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":
        if not has_bf16_units():
            return torch.mm(left.float(), right.float(), out=out)
        result = (left @ right).float()
        return result if out is None else out.copy_(result)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


@contextmanager
def _fast_products() -> Iterator[None]:
    """Let oneDNN round float32 factors to bf16; where the processor has no bf16 units it stays with fp32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # set up at import
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
