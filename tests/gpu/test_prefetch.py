"""Batches that were copied ahead are the batches that were loaded, however long the step takes."""

import pytest
import torch

from aroface.engine.prefetch import on_device
from aroface.types import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_batches_arrive_whole_and_in_order():
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randint(0, 256, (256, 112, 112, 3), dtype=torch.uint8, generator=generator).pin_memory(),
            torch.randint(0, 10, (256,), generator=generator).pin_memory(),
            torch.arange(256) + 256 * number,
        )
        for number in range(6)
    ]
    work = torch.randn(4096, 4096, device=device)
    seen = []
    for batch in on_device(iter(batches), device):
        for _ in range(5):
            work = work @ work * 1e-4
        seen.append((batch.images.clone(), batch.labels.clone(), batch.samples))
    assert len(seen) == len(batches)
    for (images, labels, samples), batch in zip(seen, batches, strict=True):
        assert torch.equal(images.cpu(), batch.images)
        assert torch.equal(labels.cpu(), batch.labels)
        assert torch.equal(samples, batch.samples)
