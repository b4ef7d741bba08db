"""Heads whose softmax runs in the fused kernels, against float64; the process needs a GPU or TRITON_INTERPRET=1."""

import math
from typing import Any

import torch
from pydantic import TypeAdapter

from aroface.config.head import HeadConfig
from aroface.heads import build_head, fused
from aroface.heads.fused import fused_terms
from aroface.heads.softmax import SoftmaxSettings, class_terms
from tests.helpers.head_oracle import HEADS, oracle_losses

#: Every kind that leaves the negatives as they are.
KINDS = [name for name, head in HEADS.items() if head["kind"] != "curricularface" and "interclass_filter" not in head]
#: rows, classes, numbers of an embedding: one tile and many, full and ragged, fewer numbers than a tile has
SHAPES = [(1, 1, 8), (3, 2, 5), (64, 128, 64), (37, 301, 24), (140, 70, 100)]


def head_against_oracle(name: str, device: str, *, classes: int = 75, dim: int = 24, batch: int = 20) -> None:
    """Loss and both gradients of a head in fp32."""
    settings: dict[str, Any] = {"logit_scale": 16.0, "implementation": "triton", **HEADS[name]}
    config = TypeAdapter(HeadConfig).validate_python(settings)
    head = build_head(config, num_classes=classes, embedding_dim=dim, seed=1).to(device)
    generator = torch.Generator().manual_seed(0)
    embeddings = (3 * torch.randn(batch, dim, generator=generator)).to(device).requires_grad_()
    labels = torch.randint(0, classes, (batch,), generator=generator)
    loss = head(embeddings, labels.to(device), step=0, update_statistics=True)
    loss.backward()
    e = embeddings.detach().cpu().double().requires_grad_()
    w = head.weight.detach().cpu().double().requires_grad_()
    statistics = {key: float(value) for key, value in head.statistics().items()}
    wanted = oracle_losses(config, statistics, e, w, labels).mean()
    wanted.backward()
    assert math.isclose(loss.item(), wanted.item(), rel_tol=2e-5), name
    assert_near(embeddings.grad, e.grad)
    assert_near(head.weight.grad, w.grad)


def terms_against_float64(shape: tuple[int, int, int], precision: str, device: str) -> None:
    """Terms and gradients of random upstream gradients; some rows belong to other ranks, some centres are long."""
    rows, classes, dim = shape
    generator = torch.Generator().manual_seed(rows)
    embeddings = torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator))
    weights = torch.randn(classes, dim, generator=generator) * torch.logspace(-3, 2, classes)[:, None]
    weights[classes // 2] *= classes < 3  # a centre of zeros
    targets = torch.randint(-1, classes, (rows,), generator=generator)
    upstream = torch.randn(2, rows, generator=generator)
    settings = SoftmaxSettings(logit_scale=32.0, chunk_classes=classes // 5 + 1, precision=precision)
    ours = _outcome(fused_terms, embeddings.to(device), weights.to(device), targets.to(device), upstream, settings)
    exact = _outcome(_formula, embeddings.double(), weights.double(), targets, upstream, settings)
    # fp32 sums in any order, of three tf32 products each on a GPU. bf16: factors of 8 bits, 2^-8 of the largest logit,
    # which rounding errors of random sign reach a quarter of.
    tolerance = 0.03 if precision == "bf16" else 1e-5 if device == "cpu" else 1e-4
    for found, wanted in zip(ours, exact, strict=True):
        assert_near(found, wanted, tolerance)
    if precision == "bf16":
        twin = _outcome(class_terms, embeddings, weights, targets, upstream, settings)
        for found, other in zip(ours, twin, strict=True):
            assert_near(found, other.double(), 0.03)


def rows_without_negatives(device: str) -> None:
    """The only class is the target: -inf, and zero gradients instead of NaN."""
    embeddings = torch.nn.functional.normalize(torch.randn(4, 8)).to(device).requires_grad_()
    weights = torch.randn(1, 8).to(device).requires_grad_()
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    total, _ = fused_terms(embeddings, weights, targets, SoftmaxSettings(16.0, 1))
    assert (total == -torch.inf).all()
    torch.nn.functional.softplus(total).sum().backward()
    assert not embeddings.grad.any()
    assert not weights.grad.any()


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float = 2e-4) -> None:
    """Near to a share of each number and of the largest of the tensor; equal where infinite."""
    found = found.detach().cpu().double()
    is_finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), is_finite)
    found, wanted = found[is_finite], wanted[is_finite]
    if len(wanted):
        error = (found - wanted).abs()
        assert (error <= share * wanted.abs() + share * wanted.abs().max() + 1e-9).all(), error.max()


def _formula(embeddings, weights, targets, settings):
    cosines = embeddings @ torch.nn.functional.normalize(weights).T
    own = torch.arange(len(weights)) == targets[:, None]
    is_empty = own.all(1)
    total = (settings.logit_scale * cosines).masked_fill(own, -torch.inf).masked_fill(is_empty[:, None], 0).logsumexp(1)
    return total.masked_fill(is_empty, -torch.inf), (cosines * own).sum(1)


def _outcome(terms, embeddings, weights, targets, upstream, settings):
    embeddings, weights = embeddings.clone().requires_grad_(), weights.clone().requires_grad_()
    total, cosines = terms(embeddings, weights, targets, settings)
    upstream = upstream.to(total)
    finite = total.masked_fill(total == -torch.inf, 0)
    gradients = torch.autograd.grad((finite * upstream[0] + cosines * upstream[1]).sum(), (embeddings, weights))
    # a gradient is inverse to the length of its centre: at unit length all are of one size
    lengths = weights.detach().norm(dim=1, keepdim=True)
    return total.detach(), cosines.detach(), gradients[0], gradients[1] * lengths


def _teach_interpreter_bf16() -> None:
    """Triton's interpreter (3.9.0) keeps bf16 numbers as their bits, and multiplies the bits in `tl.dot`."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


if __name__ == "__main__":
    _teach_interpreter_bf16()
    for tiles in (fused._NEW_TILES, fused._TILES):
        fused._NEW_TILES = tiles
        for number, shape in enumerate(SHAPES):
            terms_against_float64(shape, "fp32", "cpu")
            if number > 1:
                terms_against_float64(shape, "bf16", "cpu")
    with torch.autocast("cpu"):  # whose products would be those of bf16
        terms_against_float64(SHAPES[3], "fp32", "cpu")
    rows_without_negatives("cpu")
    for kind in KINDS:
        head_against_oracle(kind, "cpu")
