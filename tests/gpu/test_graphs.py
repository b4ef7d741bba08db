"""Passes replayed from CUDA graphs are the passes themselves."""

import contextlib
import copy
import logging

import pytest
import torch
from torch import nn

from aroface.alignment import Alignment, frozen_statistics, warp
from aroface.engine.graphed import GraphedPasses
from aroface.models.iresnet import IResNet
from tests.helpers.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    """So that what two runs differ in is not the choice of an algorithm."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def recorded(monkeypatch):
    """One entry for each recorded kind of pass."""
    record, calls = GraphedPasses._record, []
    monkeypatch.setattr(GraphedPasses, "_record", lambda *args: calls.append(1) or record(*args))
    return calls


#: What the largest gradient may differ by, of itself: nothing is expected, for the kernels are the same; fp32
#: convolutions run in tf32 (10 bits), bf16 has 8 bits, fp16 11.
TOLERANCES = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 5e-3}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision):
    dtype = TYPES.get(precision, torch.bfloat16)
    return torch.autocast("cuda", dtype=dtype, enabled=precision in TYPES, cache_enabled=False)


@pytest.mark.parametrize("statistics", ["batch", "running", "recorded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_of_psi_are_those_of_the_pass(recorded, precision, statistics):
    """Images, weights and their places change between replays; "recorded" is the published attack."""
    torch.manual_seed(0)
    network = IResNet(18, embedding_dim=16, image_size=32, width=0.25).cuda().train()
    network = network.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    passes = GraphedPasses(twin, lambda: autocast(precision))

    def eager(images):
        with autocast(precision):
            return network(images)

    def state(module):
        return contextlib.nullcontext() if statistics == "recorded" else frozen_statistics(module, statistics)

    for step in range(4):
        images = torch.randn(8, 3, 32, 32, device="cuda")
        with state(network), state(twin):
            wanted, found = gradient_of_psi(eager, images), gradient_of_psi(passes, images)
        assert (found - wanted).abs().max() <= TOLERANCES[precision] * wanted.abs().max()
        assert wanted.abs().max() > 0
        with torch.no_grad():
            for parameter in (*network.parameters(), *twin.parameters()):
                parameter.mul_(0.9)
        if step == 1:
            for parameter in twin.parameters():
                parameter.data = parameter.data.clone()
    assert len(recorded) == 2  # and again after the weights moved
    for mine, other in zip(twin.parameters(), network.parameters(), strict=True):
        assert mine.grad is None
        assert mine.requires_grad == other.requires_grad
    for mine, other in zip(twin.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)


def gradient_of_psi(called, images):
    count = len(images)
    psi = Alignment(
        torch.full((count,), 1.02, device="cuda", requires_grad=True),
        torch.full((count,), 0.03, device="cuda", requires_grad=True),
        torch.full((count, 2), 0.01, device="cuda", requires_grad=True),
    )
    warped = warp(images, psi, fill=-1.0).contiguous(memory_format=torch.channels_last)
    loss = called(warped).float().square().sum()
    scale, angle, shift = torch.autograd.grad(loss, list(psi))
    return torch.cat([scale[:, None], angle[:, None], shift], 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_of_weights_are_those_of_the_pass(recorded, precision):
    """Added up over two micro-batches, in three steps that change the weights."""
    torch.manual_seed(0)
    network = IResNet(18, embedding_dim=16, image_size=32, width=0.25).cuda().train()
    network = network.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    passes = GraphedPasses(twin, lambda: autocast(precision))
    for _ in range(3):
        for _ in range(2):
            images = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
            with autocast(precision):
                wanted = network(images)
            found = passes(images, is_main=True)
            assert (found - wanted).abs().max() <= TOLERANCES[precision] * wanted.abs().max()
            for embeddings in (found, wanted):
                embeddings.float().square().sum().backward()
        with torch.no_grad():
            for (name, mine), other in zip(twin.named_parameters(), network.parameters(), strict=True):
                if other.grad is not None:
                    difference = (mine.grad - other.grad).norm()
                    assert difference <= 10 * TOLERANCES[precision] * other.grad.norm(), name
                    other -= 1e-3 * other.grad / other.grad.norm()
                mine.copy_(other)
                mine.grad = other.grad = None
    assert len(recorded) == 1
    for mine, other in zip(twin.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("alignment", "kinds"),
    [
        ("{kind: none}", 1),
        ("{kind: adversarial, share: 0.5}", 2),
        ("{kind: adversarial, share: 0.5, steps: 2}", 2),
        ("{kind: adversarial, share: 0.5, consistency_weight: 1.0}", 3),
        ("{kind: adversarial, share: 0.5, batch_statistics: running}", 2),
        ("{kind: adversarial, share: 0.5, release_compat: true}", 2),
        ("{kind: elastic, share: 0.5}", 2),
        ("{kind: best_of, share: 0.5, candidates: 2}", 2),
        ("{kind: delayed, share: 0.5}", 1),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_six_steps_are_the_eager_ones(tmp_path, recorded, alignment, kinds, precision):
    """With accumulation. Bit for bit where the GPU repeats itself, as the same kernels run on the same numbers.

    Where it does not, only the first loss can be compared: statistics of six images magnify rounding tenfold a step.
    """
    settings = (
        f"alignment={alignment}",
        f"engine.precision={precision}",
        "engine.loss_scale={initial: 1024}",
        "batch.micro_batch=6",
        "optim.lr_per_1024=0.5",
    )
    eager, again = (train(tmp_path / name, *settings) for name in ("eager", "again"))
    assert not recorded
    replayed = train(tmp_path / "replayed", *settings, "engine.cuda_graphs=true")
    assert len(recorded) == kinds
    assert replayed.losses[0] == pytest.approx(eager.losses[0], rel=1e-2)
    if again.losses == eager.losses:
        assert replayed.losses == eager.losses
        assert all(torch.equal(replayed.tensors[name], value) for name, value in eager.tensors.items())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_follow_eager_with_running_statistics(tmp_path, recorded, stage):
    """Frozen batch norms do not magnify rounding: 1e-3 of the loss, as fp32 convolutions in tf32 have 10 bits."""
    settings = (
        *("engine.precision=fp32", "engine.batch_norm=frozen", f"engine.zero_stage={stage}"),
        *("batch.micro_batch=6", "optim.lr_per_1024=0.5"),
    )
    eager = train(tmp_path / "eager", *settings)
    replayed = train(tmp_path / "replayed", *settings, "engine.cuda_graphs=true")
    assert len(recorded) == 2
    assert replayed.losses == pytest.approx(eager.losses, rel=1e-3)


class Asking(nn.Module):
    """Asks the host in the middle of a pass, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, images):
        embeddings = self.linear(images.flatten(1))
        return embeddings * float(embeddings.detach().abs().max())


def test_a_failed_recording_leaves_a_gpu_that_works(caplog):
    network = Asking().cuda()
    passes = GraphedPasses(network, contextlib.nullcontext)
    images = torch.randn(5, 3, 2, 2, device="cuda", requires_grad=True)
    with caplog.at_level(logging.WARNING):
        found = passes(images)
    assert "could not be recorded" in caplog.text
    assert torch.equal(found, network(images))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert bool(torch.isfinite(torch.randn(8, device="cuda")).all())  # of the global generator
    torch.cuda.empty_cache()
    found.sum().backward()
    torch.cuda.synchronize()
