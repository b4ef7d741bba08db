"""IResNet against the published sizes and names, and the CPU PReLU against PyTorch's."""

import pytest
import torch
from torch import nn

from aroface.errors import ShapeError
from aroface.models import prelu
from aroface.models.iresnet import IResNet
from aroface.models.prelu import PReLU, _RowwisePReLU


@pytest.mark.parametrize(("depth", "millions"), [(18, 24.03), (34, 34.14), (50, 43.59), (100, 65.16), (200, 118.83)])
def test_parameter_count_is_the_published_one(depth, millions):
    with torch.device("meta"):
        backbone = IResNet(depth)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_names_and_shapes_are_those_of_the_public_weights():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in IResNet(50).state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["prelu.weight"] == (64,)
    assert shapes["layer1.0.bn1.running_mean"] == (64,)
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer2.0.downsample.1.weight"] == (128,)
    assert shapes["layer3.13.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["bn2.weight"] == (512,)
    assert shapes["fc.weight"] == (512, 25088)
    assert shapes["features.running_var"] == (512,)
    assert "layer1.1.downsample.0.weight" not in shapes


def test_every_trained_parameter_gets_a_gradient():
    backbone = IResNet(18, width=0.125, image_size=32, embedding_dim=8)
    backbone(torch.randn(4, 3, 32, 32)).square().sum().backward()
    missing = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert not backbone.features.weight.requires_grad


def test_recomputed_activations_give_the_same_gradients():
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        backbone = IResNet(18, width=0.125, image_size=32, embedding_dim=8, checkpoint_activations=checkpointed)
        backbone(images).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_wrong_image_size_is_named():
    with pytest.raises(ShapeError, match="set model.image_size or resize"):
        IResNet(18, width=0.125, image_size=32)(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ShapeError, match="use 16 px or more"):
        IResNet(18, image_size=8)


@pytest.mark.parametrize("slope", [0.25, -0.3, 1.0, 1.7])
@pytest.mark.parametrize("channels", [1, 3, 16, 100])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_prelu_equals_pytorchs(slope, channels, layout):
    ours, reference = PReLU(channels), nn.PReLU(channels)
    for module in (ours, reference):
        module.weight.data = torch.linspace(-0.1, 0.1, channels) + slope
    images = torch.randn(5, channels, 7, 9).contiguous(memory_format=layout)
    images[0, 0, 0, 0] = 0.0
    upstream = torch.randn_like(images)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((ours, reference), inputs, strict=True)]
    for output in outputs:
        output.backward(upstream)
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    # the order of the sums differs
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad, rtol=1e-5, atol=1e-4)
    assert ours.state_dict().keys() == reference.state_dict().keys()


def test_prelu_in_bf16_is_within_its_rounding():
    ours, reference = PReLU(16), nn.PReLU(16)
    images = torch.randn(8, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    low = images.bfloat16().requires_grad_()
    high = images.bfloat16().float().requires_grad_()
    ours(low).backward(torch.ones_like(low))
    reference(high).backward(torch.ones_like(high))
    torch.testing.assert_close(low.grad.float(), high.grad, rtol=2**-8, atol=0)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad, rtol=0.02, atol=0.5)


def test_prelu_of_blocks_is_prelu_of_the_whole(monkeypatch):
    """Activations that do not fit the cache go through it in blocks, the last of them shorter."""
    monkeypatch.setattr(prelu, "_CACHED_ELEMENTS", 0)
    monkeypatch.setattr(prelu, "_BLOCK_ELEMENTS", 4 * prelu._ROW_ELEMENTS)
    images = torch.randn(5, 16, 24, 28, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    ours, reference = PReLU(16).double(), nn.PReLU(16).double()
    for module, x in zip((ours, reference), inputs, strict=True):
        module(x).backward(images.cos())
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad, rtol=1e-12, atol=1e-10)


def test_prelu_gradients_are_finite_differences():
    ours = PReLU(3).double()
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    images = (images + 0.1 * images.sign()).requires_grad_()  # away from the kink
    assert torch.autograd.gradcheck(lambda x, weight: _RowwisePReLU.apply(x, weight), (images, ours.weight))
