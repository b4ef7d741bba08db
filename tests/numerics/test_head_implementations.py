"""One softmax, several implementations: plain autograd, chunks, fused kernels."""

import importlib.util

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from aroface.config.head import HeadConfig
from aroface.errors import ConfigError
from aroface.heads import build_head, class_sharded, fused
from tests.helpers.head_oracle import HEADS
from tests.helpers.interpreter import run_in_interpreter


def head_of(name, **settings):
    config = TypeAdapter(HeadConfig).validate_python({"logit_scale": 16.0} | HEADS[name] | settings)
    return build_head(config, num_classes=23, embedding_dim=12, seed=1)


def outcome(name, labels, **settings):
    head = head_of(name, **settings)
    embeddings = torch.randn(9, 12, generator=torch.Generator().manual_seed(2)).mul(4).requires_grad_()
    loss = head(embeddings, labels, step=0)
    loss.backward()
    return loss.detach(), embeddings.grad, head.gradient(), *head.statistics().values()


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("name", HEADS)
def test_plain_is_chunked(name, rate):
    """fp32 sums in another order."""
    labels = torch.arange(9) % 5
    chunked = outcome(name, labels, implementation="chunked", chunk_classes=4, sample_rate=rate)
    plain = outcome(name, labels, implementation="plain", sample_rate=rate)
    for found, wanted in zip(plain, chunked, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_plain_does_not_round():
    with pytest.raises(ValidationError, match="plain computes in fp32; set logit_precision: fp32"):
        head_of("arcface", implementation="plain", logit_precision="bf16")


@pytest.mark.parametrize(
    ("installed", "name", "message"),
    [
        (False, "arcface", "needs the package triton.*head.implementation: auto"),
        (True, "arcface", "needs an NVIDIA GPU and this machine has none; set head.implementation: auto"),
        (True, "curricularface", "head.kind = curricularface changes them; set head.implementation: auto"),
        (True, "arcface-filter", "head.interclass_filter changes them"),
    ],
)
def test_triton_is_refused_where_it_cannot_be(monkeypatch, installed, name, message):
    find_spec = importlib.util.find_spec
    found = object() if installed else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found if name == "triton" else find_spec(name, *a)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name != "arcface")
    monkeypatch.setattr(fused, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match=message):
        head_of(name, implementation="triton")


@pytest.mark.parametrize(
    ("name", "settings", "device", "capability", "chosen"),
    [
        ("arcface", {"logit_precision": "bf16"}, "cuda", (8, 0), "triton"),
        ("arcface", {"logit_precision": "bf16"}, "cpu", (9, 0), "chunked"),
        ("arcface", {}, "cuda", (8, 0), "chunked"),
        ("arcface", {}, "cuda", (9, 0), "triton"),
        ("arcface", {}, "cuda", (10, 0), "triton"),
        ("arcface", {}, "cuda", (12, 0), "chunked"),
        ("arcface", {}, "cpu", (9, 0), "chunked"),
        ("curricularface", {"logit_precision": "bf16"}, "cuda", (9, 0), "chunked"),
        ("arcface", {"implementation": "plain"}, "cuda", (9, 0), "plain"),
    ],
)
def test_auto_takes_what_was_faster(monkeypatch, name, settings, device, capability, chosen):
    config = TypeAdapter(HeadConfig).validate_python({"logit_scale": 16.0} | HEADS[name] | settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert class_sharded._implementation(config, torch.device(device)) == chosen
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no Triton
    assert class_sharded._implementation(config, torch.device(device)) == chosen.replace("triton", "chunked")


def test_fused_kernels_in_tritons_interpreter():
    """The kernels themselves, on the CPU: every kind of head, ragged shapes, fp32 and bf16, against float64."""
    run_in_interpreter("tests.helpers.fused_heads")
