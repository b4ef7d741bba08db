"""The first convolution with its channels filled up is the convolution, gradients too."""

import copy

import pytest
import torch
from torch import nn

from aroface.models import stem as module
from aroface.models.stem import stem
from tests.helpers.fused_norms import networks


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "_pays", lambda images: True)


@pytest.mark.parametrize("options", [{"padding": 1, "bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_filled_channels_change_nothing(as_on_a_gpu, options):
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 6, 3, **options), torch.randn(2, 3, 9, 7).contiguous(memory_format=torch.channels_last)
    twin, mine, theirs = copy.deepcopy(conv), images.clone().requires_grad_(), images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = stem(conv, mine), twin(theirs)
    assert found.dtype == wanted.dtype == torch.bfloat16
    for one in (found, wanted):
        one.float().square().sum().backward()
    # sums of the same products in another order
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=2**-6, atol=2**-5)
    for parameter, other in zip(conv.parameters(), twin.parameters(), strict=True):
        assert parameter.grad.shape == other.shape
        torch.testing.assert_close(parameter.grad, other.grad, rtol=2**-6, atol=2**-3)


@pytest.mark.parametrize("family", ["iresnet", "ir"])
def test_the_deep_networks_begin_with_it(monkeypatch, family):
    seen = []
    monkeypatch.setattr(module, "_pays", lambda images: seen.append(images.shape[1]) or False)
    networks(image_size=32)[family].train()(torch.randn(4, 3, 32, 32))
    assert seen == [3]


def test_on_a_cpu_it_is_the_convolution():
    conv, images = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    assert torch.equal(stem(conv, images), conv(images))
