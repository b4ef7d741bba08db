"""The first convolution with its channels filled up, on the kernels that a GPU chooses for it, against float64."""

import copy

import pytest
import torch
from torch import nn

from aroface.models import stem as module
from aroface.models.stem import stem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("size", [112, 17])
def test_the_filled_convolution_is_no_farther_from_float64(size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    images, upstream = torch.randn(8, 3, size, size), torch.randn(8, 64, size, size)
    exact = outcome(copy.deepcopy(conv).double(), images.double(), upstream.double())
    conv, images, upstream = (x.cuda() for x in (conv, images, upstream))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert module._pays(images)
        found, plain = (outcome(copy.deepcopy(conv), images, upstream, call) for call in (stem, nn.Conv2d.__call__))
    for mine, theirs, wanted in zip(found, plain, exact, strict=True):
        errors = [float((x.cpu().double() - wanted).norm() / wanted.norm()) for x in (mine, theirs)]
        assert errors[0] <= 1.1 * errors[1] + 1e-4, errors


def outcome(conv, images, upstream, call=nn.Conv2d.__call__):
    images = images.detach().requires_grad_()
    y = call(conv, images)
    y.backward(upstream.to(y.dtype))
    return y.detach(), images.grad, conv.weight.grad
