"""Passes replayed from CUDA graphs are the passes themselves."""

import copy

import pytest
import torch

from aroface.alignment import frozen_statistics
from aroface.engine.graphed import GraphedBackbone
from aroface.models.iresnet import IResNet
from tests.helpers.training import COMPARABLE, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture
def recorded(monkeypatch):
    """How many graphs were recorded."""
    made = torch.cuda.make_graphed_callables
    calls = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *a, **k: calls.append(1) or made(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("alignment", "kinds"),
    [
        ("{kind: none}", 1),
        ("{kind: adversarial, share: 0.5, steps: 2}", 2),
        ("{kind: adversarial, share: 0.5, consistency_weight: 1.0}", 2),
        ("{kind: best_of, share: 0.5, candidates: 2}", 1),
        ("{kind: delayed, share: 0.25}", 1),
        ("{kind: elastic, share: 0.5}", 2),
        ("{kind: adversarial, share: 0.5, release_compat: true}", 2),
    ],
)
def test_a_training_is_the_same(tmp_path, recorded, alignment, kinds):
    settings = (*COMPARABLE[:2], "data.augment={flip: 0}", f"alignment={alignment}")
    eager = train(tmp_path / "eager", *settings)
    assert not recorded
    graphed = train(tmp_path / "graphed", *settings, "engine.cuda_graphs=true")
    assert len(recorded) == kinds
    assert graphed.losses == pytest.approx(eager.losses, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_stages_and_accumulation(tmp_path, recorded, stage, precision):
    settings = (
        *COMPARABLE[1:],
        "optim.lr_per_1024=0.5",
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "engine.loss_scale={initial: 1024}",
        "batch.micro_batch=6",
    )
    eager = train(tmp_path / "eager", *settings)
    graphed = train(tmp_path / "graphed", *settings, "engine.cuda_graphs=true")
    assert len(recorded) == 1
    assert graphed.losses == pytest.approx(eager.losses, rel=1e-2)


def test_statistics_of_the_batch_attacks_and_moved_weights(recorded):
    """Outputs, gradients and running statistics of main passes and attacks in turns, local batch norms, fused."""
    torch.manual_seed(0)
    network = IResNet(18, embedding_dim=16, image_size=32, width=0.25).cuda().train()
    twin = copy.deepcopy(network)
    graphed = GraphedBackbone(twin)
    for step in range(4):
        images = torch.randn(32, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        upstream = torch.randn(32, 16, device="cuda")
        found = [_attack(called, module, images[:8]) for called, module in ((network, network), (graphed, twin))]
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
        for called in (network, graphed):
            called(images).backward(upstream)
        for (name, mine), other in zip(twin.named_parameters(), network.parameters(), strict=True):
            if other.grad is not None:
                scale = float(other.grad.abs().max())
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-2 * scale + 1e-3, msg=name)
        with torch.no_grad():
            for mine, other in zip(twin.parameters(), network.parameters(), strict=True):
                mine.mul_(0.99)
                other.mul_(0.99)
                mine.grad = other.grad = None
        if step == 1:
            for parameter in twin.parameters():
                parameter.data = parameter.data.clone()
    assert len(recorded) == 4  # two kinds, and both again after the weights moved
    for mine, other in zip(twin.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def _attack(called, module, images):
    images = images.clone().requires_grad_()
    with frozen_statistics(module, "batch"):
        embeddings = called(images)
        (gradient,) = torch.autograd.grad(embeddings.square().sum(), images)
    return embeddings.detach(), gradient / gradient.abs().max()
