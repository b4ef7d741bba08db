"""The fused softmax compiled for a GPU, against float64; the interpreter runs the same checks on the CPU."""

import gc

import pytest
import torch

from tests.helpers.fused_heads import KINDS, SHAPES, head_against_oracle, rows_without_negatives, terms_against_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES[2:], (300, 20_000, 512)])
def test_terms(shape, precision):
    terms_against_float64(shape, precision, "cuda")


def test_the_same_twice():
    """No result depends on the order in which programs run."""
    from aroface.heads.fused import fused_terms
    from aroface.heads.softmax import SoftmaxSettings

    weights = torch.randn(30_000, 512, device="cuda", requires_grad=True)
    embeddings = torch.nn.functional.normalize(torch.randn(300, 512, device="cuda")).requires_grad_()
    targets = torch.randint(-1, 100, (300,), device="cuda")  # several images of most classes
    results = []
    for _ in range(2):
        total, cosines = fused_terms(embeddings, weights, targets, SoftmaxSettings(64.0, 4096, "bf16"))
        results.append((total, *torch.autograd.grad((total - cosines).sum(), (embeddings, weights))))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_rows_without_negatives():
    rows_without_negatives("cuda")


@pytest.mark.parametrize("name", KINDS)
def test_heads(name):
    head_against_oracle(name, "cuda", classes=1000, dim=128, batch=150)


def test_neither_logits_nor_memory_grow_with_the_classes():
    """Beyond centres and their gradient: a chunk of centres and softmax, and what was there before."""
    from aroface.heads.fused import fused_terms
    from aroface.heads.softmax import SoftmaxSettings

    extra = []
    gc.collect()
    for classes in (50_000, 400_000):
        weights = torch.randn(classes, 64, device="cuda", requires_grad=True)
        embeddings = torch.nn.functional.normalize(torch.randn(1024, 64, device="cuda")).requires_grad_()
        targets = torch.randint(0, classes, (1024,), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total, _ = fused_terms(embeddings, weights, targets, SoftmaxSettings(64.0, 8192, "bf16"))
        total.sum().backward()
        extra.append(torch.cuda.max_memory_allocated() - before - weights.numel() * 4)
        del weights, embeddings, total
    assert extra[1] < extra[0] * 1.1 + 2**20
