"""Batch norms that run in the fused kernels, against float64; the process needs a GPU or TRITON_INTERPRET=1."""

import copy
from typing import Any

import torch
from torch import nn

from aroface.models import norm as fused
from aroface.models.backbone import Backbone
from aroface.models.ir import IRNet
from aroface.models.iresnet import IResNet
from aroface.models.mobilefacenet import MobileFaceNet
from aroface.models.norm import forked_norm, fuse_norms, norm

#: (B, C, H, W): one tile and several, channels that fill no tile, more channels than a tile has
SHAPES = [(2, 8, 1, 1), (2, 16, 3, 3), (3, 24, 5, 4), (2, 130, 9, 8), (5, 64, 14, 14)]
#: what follows: PReLU, residual
FOLLOWERS = [(False, False), (True, False), (False, True), (True, True)]
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def norm_against_float64(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    has_prelu: bool,
    has_residual: bool,
    is_frozen: bool = False,
) -> None:
    """Output, all gradients and the running statistics; means far from zero, slopes of any sign, gradients strided.

    `is_frozen`: the norm uses its running averages, which stay.
    """
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    x = (drawn(*shape) * drawn(channels).exp()[:, None, None] + 5 * drawn(channels)[:, None, None]).to(dtype)
    residual, upstream = drawn(*shape).to(dtype), drawn(*shape).to(dtype)
    module, prelu = nn.BatchNorm2d(channels), nn.PReLU(channels)
    with torch.no_grad():
        for values in (module.weight, module.bias, prelu.weight):
            values.copy_(drawn(channels))
    if is_frozen:
        module.eval()
        module.running_mean, module.running_var = 5 * drawn(channels), drawn(channels).exp()
    exact, exact_prelu = copy.deepcopy(module).double(), copy.deepcopy(prelu).double()
    module, prelu = module.to(device), prelu.to(device)
    inputs = [t.to(device).contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, residual)]
    wanted_inputs = [t.detach().double().requires_grad_() for t in (x, residual)]

    assert fused._fits(module, inputs[0], prelu if has_prelu else None, inputs[1] if has_residual else None)
    y = norm(module, inputs[0], prelu=prelu if has_prelu else None, residual=inputs[1] if has_residual else None)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(upstream.to(device).contiguous())  # in PyTorch's own layout
    wanted = exact(wanted_inputs[0])
    wanted = exact_prelu(wanted) if has_prelu else wanted
    wanted = wanted + wanted_inputs[1] if has_residual else wanted
    wanted.backward(upstream.double())

    share = _ROUNDING[dtype]
    _near(y, wanted, share)
    # an input gradient is the difference of sums, which cancel where there are few rows
    _near(inputs[0].grad, wanted_inputs[0].grad, share, least=share * float(exact.weight.detach().abs().max()))
    if has_residual:
        assert torch.equal(inputs[1].grad.cpu(), upstream)
    for found, other in zip(module.parameters(), exact.parameters(), strict=True):
        _near(found.grad, other.grad, 1e-4)
    if has_prelu:
        _near(prelu.weight.grad, exact_prelu.weight.grad, 1e-4)
    _near(module.running_mean, exact.running_mean, 1e-5)
    _near(module.running_var, exact.running_var, 1e-4)
    assert int(module.num_batches_tracked) == (0 if is_frozen else 1)


def fork_against_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, is_frozen: bool = False
) -> None:
    """The norm, its input for a skip, and the gradient of the input through both; strides of every kind come back."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, of_norm, of_skip = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    module = nn.BatchNorm2d(shape[1]).train(not is_frozen)
    exact = copy.deepcopy(module).double()
    module = module.to(device)
    found = x.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    wanted = x.detach().double().requires_grad_()
    y, skip = forked_norm(module, found)
    assert torch.equal(skip, found)
    assert y.grad_fn is skip.grad_fn  # one backward pass takes both gradients
    torch.autograd.backward((y, skip), (of_norm.to(device), of_skip.to(device)))
    torch.autograd.backward((exact(wanted), wanted), (of_norm.double(), of_skip.double()))
    _near(y, exact(wanted), _ROUNDING[dtype])
    _near(found.grad, wanted.grad, _ROUNDING[dtype], least=_ROUNDING[dtype])
    for one, other in zip(module.parameters(), exact.parameters(), strict=True):
        _near(one.grad, other.grad, 1e-4)


def constant_weights(device: str, *, is_frozen: bool) -> None:
    """As the attack wants them: the gradient of the input is the same, those of the weights are not formed."""
    module, prelu = nn.BatchNorm2d(24).to(device).train(not is_frozen), nn.PReLU(24).to(device)
    x = torch.randn(3, 24, 5, 4).to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    (wanted,) = torch.autograd.grad(norm(module, x, prelu=prelu).square().sum(), x)
    for parameter in (*module.parameters(), *prelu.parameters()):
        parameter.requires_grad_(False)
    norm(module, x, prelu=prelu).square().sum().backward()
    assert torch.equal(x.grad, wanted)
    assert module.weight.grad is None
    assert prelu.weight.grad is None


def variance_beside_a_large_mean(device: str) -> None:
    """The square of the mean is 90,000 times the variance; float32 sums of squares would lose 1 % of it."""
    x = 300 + torch.randn(4, 8, 20, 20, generator=torch.Generator().manual_seed(0))
    module = nn.BatchNorm2d(8, momentum=1.0).to(device)
    norm(module, x.to(device).contiguous(memory_format=torch.channels_last))
    _near(module.running_var, x.double().transpose(0, 1).flatten(1).var(1), 1e-5)


def statistics_that_are_not_recorded(device: str) -> None:
    """As the attack wants them: nothing moves, the output is the same."""
    module = nn.BatchNorm2d(8).to(device)
    x = torch.randn(2, 8, 3, 3).to(device).contiguous(memory_format=torch.channels_last)
    recorded = norm(module, x)
    before = {name: value.clone() for name, value in module.named_buffers()}
    kept = module.running_mean, module.running_var
    module.track_running_stats, module.running_mean, module.running_var = False, None, None
    assert torch.equal(norm(module, x), recorded)
    module.running_mean, module.running_var = kept
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


def networks(image_size: int) -> dict[str, Backbone]:
    """One small network of each family with batch norms between its layers."""
    torch.manual_seed(0)
    return {
        "iresnet": IResNet(18, embedding_dim=16, image_size=image_size, width=0.125),
        "ir": IRNet(18, embedding_dim=16, image_size=image_size, width=0.125, dropout=0.0),
        "mobilefacenet": MobileFaceNet("base", embedding_dim=16, image_size=image_size),
    }


def network_against_its_twin(network: Backbone, device: str, *, dtype: torch.dtype | None = None) -> None:
    """A whole network in fp32 (or autocast): embeddings and gradients with and without the kernels, in float64 too."""
    torch.manual_seed(0)
    network, size = network.to(device).train(), network.image_size
    images = torch.randn(8, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(8, 16, device=device)
    found = {}
    for name, is_wanted in (("fused", True), ("plain", False)):
        twin = copy.deepcopy(network)
        fuse_norms(twin, is_wanted=is_wanted)
        found[name] = _outcome(twin, images, upstream, dtype)
    exact = _outcome(copy.deepcopy(network).double().cpu(), images.double().cpu(), upstream.double().cpu(), None)
    # A bias in front of another batch norm has the gradient zero, of which every error is a large share.
    least = 0.01 * torch.stack([wanted.norm() for wanted in exact.values()]).median()
    for key, wanted in exact.items():
        scale = wanted.norm() + least
        errors = {name: float((values[key].double().cpu() - wanted).norm() / scale) for name, values in found.items()}
        # no farther from float64 than PyTorch's operations are, up to chance
        assert errors["fused"] <= 3 * errors["plain"] + (1e-4 if dtype is None else 1e-2), (key, errors)


def _outcome(
    network: nn.Module, images: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        embeddings = network(images)
    embeddings.backward(upstream)
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    statistics = {name: value for name, value in network.named_buffers() if name.endswith(("mean", "var"))}
    return {"embeddings": embeddings.detach(), **gradients, **statistics}


def _near(found: Any, wanted: torch.Tensor, share: float, least: float = 1e-6) -> None:
    found, wanted = found.detach().cpu().double(), wanted.detach()
    error = (found - wanted).abs()
    assert (error <= share * wanted.abs() + share * wanted.abs().max() + least).all(), (error.max(), wanted.abs().max())


if __name__ == "__main__":
    for each in SHAPES:
        for prelu_follows, residual_follows in FOLLOWERS:
            for kind in (torch.float32, torch.bfloat16):
                norm_against_float64(each, kind, "cpu", has_prelu=prelu_follows, has_residual=residual_follows)
    for prelu_follows, residual_follows in FOLLOWERS:
        followers = {"has_prelu": prelu_follows, "has_residual": residual_follows}
        norm_against_float64(SHAPES[2], torch.float32, "cpu", **followers, is_frozen=True)
        norm_against_float64(SHAPES[3], torch.bfloat16, "cpu", **followers, is_frozen=True)
    for kind in _ROUNDING:
        fork_against_float64(SHAPES[2], kind, "cpu")
        fork_against_float64(SHAPES[3], kind, "cpu")
        fork_against_float64(SHAPES[3], kind, "cpu", is_frozen=True)
    for frozen in (False, True):
        constant_weights("cpu", is_frozen=frozen)
    variance_beside_a_large_mean("cpu")
    statistics_that_are_not_recorded("cpu")
    for family in ("iresnet", "ir"):  # a MobileFaceNet takes half a minute in the interpreter
        network_against_its_twin(networks(image_size=16)[family], "cpu")
