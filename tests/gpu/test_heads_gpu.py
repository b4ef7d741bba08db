"""Heads on a GPU are the heads on the CPU."""

import pytest
import torch
from pydantic import TypeAdapter

from aroface.config.head import HeadConfig
from aroface.heads import build_head
from tests.helpers.head_oracle import HEADS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def outcome(device, name, **settings):
    config = TypeAdapter(HeadConfig).validate_python({"logit_scale": 16.0} | HEADS[name] | settings)
    head = build_head(config, num_classes=200, embedding_dim=64, seed=1).to(device)
    generator = torch.Generator().manual_seed(0)
    embeddings = (5 * torch.randn(32, 64, generator=generator)).to(device).requires_grad_()
    labels = torch.randint(0, 200, (32,), generator=generator).to(device)
    loss = head(embeddings, labels, step=0)
    loss.backward()
    return loss.detach().cpu(), embeddings.grad.cpu(), head.gradient().cpu()


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("name", HEADS)
def test_fp32(name, rate):
    settings = {"chunk_classes": 64, "sample_rate": rate}
    for found, wanted in zip(outcome("cuda", name, **settings), outcome("cpu", name, **settings), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["arcface", "curricularface"])
def test_bf16(name):
    settings = {"chunk_classes": 64, "logit_precision": "bf16"}
    found, wanted = outcome("cuda", name, **settings), outcome("cpu", name)
    assert found[0].item() == pytest.approx(wanted[0].item(), abs=16 * 2**-7)
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > 0.999
