"""The class-sharded head on 2 and 3 ranks against one rank: loss, gradients, weights after steps."""

import pytest
import torch

from aroface.config.schema import AdaFaceConfig, ArcFaceConfig
from aroface.heads import HeadSGD, build_head
from tests.helpers.ranks import run_on_ranks

CLASSES, DIM, BATCH, STEPS = 17, 8, 12, 5


def head_config(kind):
    if kind == "adaface":
        return AdaFaceConfig(kind="adaface", logit_scale=16.0, margin=0.4, statistics_momentum=0.3, chunk_classes=4)
    return ArcFaceConfig(kind="arcface", logit_scale=16.0, margin=0.4, chunk_classes=4)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    embeddings = 5 * torch.randn(BATCH, DIM, generator=generator)
    # labels of the first classes only, so that on 3 ranks the last one has no positive
    return embeddings, torch.randint(0, 6, (BATCH,), generator=generator)


def train(rank, ranks, kind):
    head = build_head(head_config(kind), num_classes=CLASSES, embedding_dim=DIM, seed=2, rank=rank, world_size=ranks)
    optimizer = HeadSGD(head, momentum=0.9, weight_decay=1e-3)
    losses, gradients, weight_gradient = [], [], None
    for step in range(STEPS):
        embeddings, labels = batch(step)
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        local = embeddings[mine].clone().requires_grad_()
        loss = head(local, labels[mine], step=step)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(local.grad.clone())
        if step == 0:
            weight_gradient = head.weight.grad.clone()
        optimizer.step(0.5)
    statistics = (float(head.norm_mean), float(head.norm_std))
    return losses, torch.stack(gradients), weight_gradient, head.weight.detach().clone(), statistics


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["arcface", "adaface"])
def test_ranks_equal_one_rank(ranks, kind):
    losses, gradients, weight_gradient, weight, statistics = train(0, 1, kind)
    results = run_on_ranks(train, ranks, kind)
    for result in results:
        # the same fp32 sums in another order
        assert result[0] == pytest.approx(losses, rel=1e-5)
        assert result[4] == pytest.approx(statistics, rel=1e-5)
    # each rank's gradient carries the factor `ranks` that the engine's averaging takes away again
    together = torch.cat([result[1] for result in results], 1) / ranks
    torch.testing.assert_close(together, gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), weight_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([r[3] for r in results]), weight, rtol=1e-4, atol=1e-6)
