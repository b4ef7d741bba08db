"""Batch norm with its PReLU or residual in one pass: the kernels against float64, and where they are not used."""

import copy

import pytest
import torch
from torch import nn

from aroface.models import norm as fused
from aroface.models.norm import forked_norm, fuse_norms, norm
from tests.helpers.fused_norms import networks
from tests.helpers.interpreter import run_in_interpreter


def test_kernels_in_tritons_interpreter():
    """On the CPU: fp32 and bf16, ragged shapes, every follower, statistics, and a whole network beside its twin."""
    run_in_interpreter("tests.helpers.fused_norms")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`_fits` decides as it does on a GPU; no kernel runs."""
    monkeypatch.setattr(fused, "is_interpreted", lambda: True)
    monkeypatch.setattr(fused, "_works", lambda device: True)


def _image(channels=8, size=3):
    return torch.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last)


def test_every_norm_of_every_network_runs_fused(as_on_a_gpu, monkeypatch):
    def plain(x, weight, bias, slope, residual, module, is_forked):
        seen.append(module)
        y = module(x) if slope is None else torch.nn.functional.prelu(module(x), slope)
        y = y if residual is None else y + residual
        return (y, x) if is_forked else y

    monkeypatch.setattr(fused._FusedNorm, "apply", plain)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for name, network in networks(image_size=32).items():
        seen = []
        twin = copy.deepcopy(network)
        found = network.train()(images)
        wanted = [module for module in network.modules() if type(module) is nn.BatchNorm2d]
        assert {id(module) for module in seen} == {id(module) for module in wanted}, name
        fuse_norms(twin, is_wanted=False)
        assert torch.equal(found, twin.train()(images)), name


def test_what_the_kernels_cannot_do_is_left_to_pytorch(as_on_a_gpu):
    x, module, prelu = _image(), nn.BatchNorm2d(8), nn.PReLU(8)
    assert fused._fits(module, x, prelu, x)
    partitioned = nn.BatchNorm2d(8)
    partitioned.weight.ds_id = 0
    never = nn.BatchNorm2d(8)
    fuse_norms(never, is_wanted=False)
    for other in (
        copy.deepcopy(module).bfloat16(),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.SyncBatchNorm(8),
        partitioned,
        never,
    ):
        assert not fused._fits(other, x, prelu, x), other
    assert not fused._fits(module, x.contiguous(), prelu, None)
    assert not fused._fits(module, x.double(), prelu, None)
    assert not fused._fits(module, x, nn.PReLU(1), None)
    assert not fused._fits(module, x, None, x.bfloat16())
    fuse_norms(never, is_wanted=True)
    assert fused._fits(never, x, None, None)


def test_running_averages_are_fused_where_gradients_are_wanted(as_on_a_gpu):
    x, module = _image(), nn.BatchNorm2d(8).eval()
    assert fused._fits(module, x, None, None)
    with torch.no_grad():
        assert not fused._fits(module, x, None, None)
    module.running_mean = module.running_var = None  # then it takes those of the batch
    assert not fused._fits(module, x, None, None)


def test_without_kernels_it_is_pytorchs_own():
    x, residual, module, prelu = _image(), _image(), nn.BatchNorm2d(8), nn.PReLU(8)
    twin = copy.deepcopy(module)
    assert torch.equal(norm(module, x, prelu=prelu, residual=residual), prelu(twin(x)) + residual)
    assert torch.equal(module.running_mean, twin.running_mean)
    y, skip = forked_norm(module, x)
    assert torch.equal(y, twin(x))
    assert skip is x


def test_kernels_that_fail_are_left_alone_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(fused, "is_interpreted", lambda: True)

    def broken(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused._FusedNorm, "apply", broken)
    fused._works.cache_clear()
    try:
        x, module = _image(), nn.BatchNorm2d(8)
        assert torch.equal(norm(module, x), copy.deepcopy(module)(x))
        norm(module, x)
    finally:
        fused._works.cache_clear()
    assert [record.message for record in caplog.records].count(caplog.messages[0]) == 1
    assert "no C compiler" in caplog.messages[0]
