"""The class-sharded head on 1, 2 and 3 ranks against float64 on one, every step of a short training.

Tolerances: one step is a handful of float32 sums of at most 17 terms, each right to about 1e-6 of its largest term, so
losses and gradients of the first step agree to 2e-5 of the largest number of a row. Every later step starts from
weights that carry the errors of the steps before, so that it is allowed 2e-5 more with each. Weights add 20 updates,
with a momentum of 0.9 that multiplies each by up to 10: 2e-4.
"""

import pytest
import torch
from pydantic import TypeAdapter

from aroface.config.head import HeadConfig
from aroface.errors import ConfigError
from aroface.heads import HeadSGD, build_head
from tests.helpers.head_oracle import HEADS, oracle_losses, updated_statistics
from tests.helpers.ranks import run_on_ranks

CLASSES, DIM, BATCH, STEPS = 17, 8, 12, 20
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-3
STEP_SHARE, WEIGHT_SHARE = 2e-5, 2e-4
#: name -> settings of every run: all heads, chunks smaller than a rank's classes, Partial FC
RUNS = {name: {**settings, "chunk_classes": 4} for name, settings in HEADS.items()} | {
    f"{name}, sampled": {**HEADS[name], "sample_rate": 0.5}
    for name in ("arcface", "adaface", "curricularface", "magface")
}


def head_config(name):
    return TypeAdapter(HeadConfig).validate_python({"logit_scale": 16.0} | RUNS[name])


def batch(step):
    """Embeddings and labels; on even steps of the first classes only, so that all ranks but one have no positive."""
    generator = torch.Generator().manual_seed(step)
    embeddings = 3 * torch.randn(BATCH, DIM, generator=generator)
    return embeddings, torch.randint(0, CLASSES if step % 2 else 5, (BATCH,), generator=generator)


def train(rank, ranks, name):
    """Everything that a rank sees in 20 steps."""
    head = build_head(head_config(name), num_classes=CLASSES, embedding_dim=DIM, seed=2, rank=rank, world_size=ranks)
    optimizer = HeadSGD(head, momentum=MOMENTUM, weight_decay=DECAY)
    seen = {"start": head.weight.detach().clone(), "losses": [], "embeddings": [], "chosen": [], "centres": []}
    for step in range(STEPS):
        embeddings, labels = batch(step)
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        local = embeddings[mine].clone().requires_grad_()
        loss = head(local, labels[mine], step=step)
        loss.backward()
        seen["losses"].append(loss.item())
        # the factor `ranks` is what the engine's averaging takes away again
        seen["embeddings"].append(local.grad / ranks)
        values = head.gradient()
        rows = head.weight.grad.indices()[0] if head.weight.grad.is_sparse else torch.arange(len(head.weight))
        seen["chosen"].append(rows + head.class_range[0])
        seen["centres"].append(values.clone())
        optimizer.step(LR)
    seen["end"] = head.weight.detach().clone()
    seen["statistics"] = {key: float(value) for key, value in head.statistics().items()}
    return seen


def train_all(rank, ranks):
    return {name: train(rank, ranks, name) for name in RUNS}


@pytest.fixture(scope="module", params=[1, 2, pytest.param(3, marks=pytest.mark.slow)])
def runs(request):
    """What each rank saw, by run."""
    if request.param == 1:
        return {name: [train(0, 1, name)] for name in RUNS}
    results = run_on_ranks(train_all, request.param)
    return {name: [result[name] for result in results] for name in RUNS}


def start(name):
    head = build_head(head_config(name), num_classes=CLASSES, embedding_dim=DIM, seed=2)
    return head.weight.detach(), {key: float(value) for key, value in head.statistics().items()}


def assert_near(found, wanted, share):
    """Within a share of the largest number of the same row."""
    scale = wanted.abs().amax(-1, keepdim=True)
    worst = ((found.double() - wanted).abs() / (scale + 1e-9)).max()
    assert worst <= share


@pytest.mark.parametrize("name", RUNS)
def test_ranks_equal_float64_on_one(runs, name):
    config, results = head_config(name), runs[name]
    weights, statistics = start(name)
    assert torch.equal(torch.cat([result["start"] for result in results]), weights)
    weights, momentum = weights.double(), torch.zeros(CLASSES, DIM, dtype=torch.float64)
    for step in range(STEPS):
        embeddings, labels = batch(step)
        chosen = torch.cat([result["chosen"][step] for result in results])
        among = torch.searchsorted(chosen, labels)
        assert torch.equal(chosen[among], labels)
        e, w = embeddings.double().requires_grad_(), weights[chosen].requires_grad_()
        statistics = updated_statistics(config, statistics, e, w, among)
        loss = oracle_losses(config, statistics, e, w, among).mean()
        loss.backward()
        for result in results:
            assert result["losses"][step] == pytest.approx(loss.item(), rel=STEP_SHARE * (step + 1))
        share = STEP_SHARE * (step + 1)
        assert_near(torch.cat([result["embeddings"][step] for result in results]), e.grad, share)
        assert_near(torch.cat([result["centres"][step] for result in results]), w.grad, share)
        momentum[chosen] = MOMENTUM * momentum[chosen] + w.grad + DECAY * w.detach()
        weights[chosen] -= LR * momentum[chosen]
    assert_near(torch.cat([result["end"] for result in results]), weights, WEIGHT_SHARE)
    for result in results:
        assert result["statistics"] == pytest.approx(statistics, rel=1e-5)


def test_sampling_differs_between_ranks_and_steps_and_keeps_the_positives(runs):
    results = runs["arcface, sampled"]
    for result in results:
        assert len({tuple(chosen.tolist()) for chosen in result["chosen"]}) > 10
    assert sum(len(result["chosen"][0]) for result in results) < CLASSES


def own_rows(rank, ranks):
    """Gradient of this rank's embeddings by the mean of the batch, and by the mean of its own rows."""
    gradients, losses = [], []
    for reduction in ("mean", "none"):
        head = build_head(
            head_config("magface"), num_classes=CLASSES, embedding_dim=DIM, seed=2, rank=rank, world_size=ranks
        )
        embeddings, labels = batch(1)
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        local = embeddings[mine].clone().requires_grad_()
        loss = head(local, labels[mine], step=0, reduction=reduction)
        loss.mean().backward()
        gradients.append((local.grad, head.weight.grad))
        losses.append(loss.detach())
    return losses, gradients


@pytest.mark.slow
def test_losses_of_the_own_images():
    results = run_on_ranks(own_rows, 3)
    config = head_config("magface")
    weights, statistics = start("magface")
    embeddings, labels = batch(1)
    wanted = oracle_losses(config, statistics, embeddings.double(), weights.double(), labels)
    torch.testing.assert_close(torch.cat([losses[1] for losses, _ in results]).double(), wanted, rtol=2e-5, atol=1e-6)
    for (mean, _), (by_mean, by_rows) in results:
        assert mean.item() == pytest.approx(wanted.mean().item(), rel=2e-5)
        for one, other in zip(by_mean, by_rows, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_fewer_classes_than_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"2 classes cannot be shared out over 3 ranks.*Use fewer ranks"):
        build_head(head_config("arcface"), num_classes=2, embedding_dim=DIM, seed=0, rank=0, world_size=3)
