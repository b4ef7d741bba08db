"""Every head against a float64 formula that was written independently: losses, gradients, statistics, edges."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from aroface.config.head import HeadConfig
from aroface.heads import HeadSGD, build_head
from tests.helpers.head_oracle import HEADS, oracle_losses, updated_statistics

CLASSES, DIM, BATCH = 23, 12, 9

pytestmark = pytest.mark.parametrize("name", HEADS)


def make(name, classes=CLASSES, **settings):
    config = TypeAdapter(HeadConfig).validate_python({"logit_scale": 16.0} | HEADS[name] | settings)
    head = build_head(config, num_classes=classes, embedding_dim=DIM, seed=1)
    with torch.no_grad():  # statistics as in the middle of a training
        for key, value in {"norm_mean": 7.0, "norm_std": 3.0, "t": 0.3}.items():
            if key in head.statistics():
                head.statistics()[key].fill_(value)
    return head


def batch(head, count=BATCH):
    """Random faces of very different norms; the first is near its class, the second opposite to it."""
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(count, DIM, generator=generator) * torch.logspace(-1, 0.8, count)[:, None]
    labels = torch.randint(0, head.num_classes, (count,), generator=generator)
    with torch.no_grad():
        for row, sign in list(enumerate((1.0, -1.0)))[:count]:
            noise = 0.2 * torch.randn(DIM, generator=generator) / math.sqrt(DIM)
            embeddings[row] = 5 * (sign * head.weight[labels[row]] / head.weight[labels[row]].norm() + noise)
    return embeddings, labels


def expected(head, embeddings, labels, *, update=True):
    """Losses, both gradients and the statistics of the oracle, from where the head stands."""
    e = embeddings.detach().double().requires_grad_()
    w = head.weight.detach().double().requires_grad_()
    statistics = {key: float(value) for key, value in head.statistics().items()}
    if update:
        statistics = updated_statistics(head.config, statistics, e, w, labels)
    losses = oracle_losses(head.config, statistics, e, w, labels)
    losses.mean().backward()
    return losses.detach(), e.grad, w.grad, statistics


def assert_near(found, wanted, share=2e-4):
    """Near in float32: a share of each number, and of the largest number of the same row."""
    scale = wanted.abs().amax(-1, keepdim=True)
    assert ((found.double() - wanted).abs() <= share * wanted.abs() + share * scale + 1e-9).all()


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("count", [1, BATCH])
def test_losses_gradients_and_statistics(name, chunk, count):
    head = make(name, chunk_classes=chunk)
    embeddings, labels = batch(head, count)
    losses, grad_embeddings, grad_weights, statistics = expected(head, embeddings, labels)
    embeddings.requires_grad_()
    loss = head(embeddings, labels, step=0)
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=2e-5)
    assert_near(embeddings.grad, grad_embeddings)
    assert_near(head.weight.grad, grad_weights)
    assert {key: float(value) for key, value in head.statistics().items()} == pytest.approx(statistics, rel=1e-5)


def test_without_reduction(name):
    head = make(name)
    embeddings, labels = batch(head)
    wanted = expected(head, embeddings, labels, update=False)[0]
    found = head(embeddings, labels, step=0, update_statistics=False, reduction="none")
    torch.testing.assert_close(found.detach().double(), wanted, rtol=2e-5, atol=1e-6)
    assert head(embeddings, labels, step=0, update_statistics=False) == found.mean()


def test_attack_pass_leaves_no_trace(name):
    head = make(name)
    embeddings, labels = batch(head)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    wanted = expected(head, embeddings, labels, update=False)[1]
    embeddings.requires_grad_()
    head(embeddings, labels, step=0, update_statistics=False).backward()
    assert_near(embeddings.grad, wanted)
    assert head.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize("norm", [0.0, 1e-20, 1e-3, 1e6, 1e15])
def test_norms_from_zero_to_huge(name, norm):
    head = make(name)
    labels = torch.tensor([3, 4])
    embeddings = torch.nn.functional.normalize(torch.randn(2, DIM, generator=torch.Generator().manual_seed(0)))
    embeddings[0] *= norm
    losses, grad_embeddings, grad_weights, _ = expected(head, embeddings, labels)
    embeddings.requires_grad_()
    loss = head(embeddings, labels, step=0)
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=2e-5)
    assert torch.isfinite(embeddings.grad).all()
    assert_near(head.weight.grad, grad_weights)
    if norm > 1e-12:  # below, normalisation stops dividing by the norm and the two precisions part
        assert_near(embeddings.grad, grad_embeddings, share=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_embeddings_on_their_centre_and_opposite_to_it(name, sign):
    head = make(name)
    labels = torch.arange(4)
    embeddings = 50 * sign * head.weight.detach()[:4]
    wanted = expected(head, embeddings, labels)[0].mean().item()
    embeddings.requires_grad_()
    loss = head(embeddings, labels, step=0)
    loss.backward()
    # the cosine is known to 6e-8, its angle to 3.5e-4 only; s = 16 and m1 up to 2 multiply that
    assert loss.item() == pytest.approx(wanted, abs=16 * 2 * 3.5e-4)
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(head.weight.grad).all()


def test_classes_that_are_absent_are_pushed_away_and_no_more(name):
    """An absent class appears as a negative only, and its gradient does not change its length."""
    head = make(name)
    embeddings, _ = batch(head)
    head(embeddings, torch.zeros(BATCH, dtype=torch.int64), step=0).backward()
    absent = head.weight.grad[1:]
    radial = (absent * head.weight.detach()[1:]).sum(1).abs()
    assert (radial <= 1e-4 * absent.norm(dim=1) * head.weight[1:].norm(dim=1)).all()
    if name != "curricularface-reflect" and "filter" not in name:
        assert (absent.norm(dim=1) > 0).all()


def test_a_single_class_costs_nothing(name):
    head = make(name, classes=1, **({"regulariser_weight": 0.0} if "magface" in name else {}))
    embeddings = torch.randn(3, DIM, requires_grad=True)
    loss = head(embeddings, torch.zeros(3, dtype=torch.int64), step=0)
    loss.backward()
    assert loss.item() == 0
    assert not embeddings.grad.any()
    assert not head.weight.grad.any()


def test_autocast_changes_nothing(name):
    head = make(name)
    embeddings, labels = batch(head)
    statistics = {key: value.clone() for key, value in head.statistics().items()}

    def results():
        """Losses, and with the same statistics the gradients of embeddings and centres of a training step."""
        leaf = embeddings.clone().requires_grad_()
        losses = head(leaf, labels, step=0, update_statistics=False, reduction="none")
        head.weight.grad = None
        head(leaf, labels, step=0).backward()
        for key, value in statistics.items():
            head.statistics()[key].copy_(value)
        return losses, leaf.grad, head.weight.grad

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    for found, wanted in zip(cast, plain, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_bf16_embeddings_get_bf16_gradients(name):
    head = make(name)
    embeddings, labels = batch(head)
    embeddings = embeddings.bfloat16().requires_grad_()
    loss = head(embeddings, labels, step=0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert embeddings.grad.dtype == torch.bfloat16
    assert torch.isfinite(embeddings.grad).all()


@pytest.mark.parametrize("chunk", [5, None])
def test_bf16_products_stay_near(name, chunk):
    """Factors of 8 bits: a cosine is off by at most 2^-8, a logit by s times that, twice where the slope is 2."""
    head = make(name, chunk_classes=chunk, logit_precision="bf16")
    embeddings, labels = batch(head)
    losses, grad_embeddings, grad_weights, _ = expected(head, embeddings, labels)
    embeddings.requires_grad_()
    found = head(embeddings, labels, step=0)
    found.backward()
    assert found.item() == pytest.approx(losses.mean().item(), abs=2 * 16 * 2**-8)
    for mine, wanted in ((embeddings.grad, grad_embeddings), (head.weight.grad, grad_weights)):
        cosine = torch.nn.functional.cosine_similarity(mine.double().flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.999


def test_sampled_classes_are_the_softmax(name):
    head = make(name, classes=200, sample_rate=0.1)
    embeddings, labels = batch(head)
    statistics = {key: float(value) for key, value in head.statistics().items()}
    embeddings.requires_grad_()
    loss = head(embeddings, labels, step=0)
    loss.backward()
    chosen = head.weight.grad.coalesce().indices()[0]
    assert len(chosen) == 20
    e = embeddings.detach().double().requires_grad_()
    w = head.weight.detach()[chosen].double().requires_grad_()
    among = torch.searchsorted(chosen, labels)
    assert torch.equal(chosen[among], labels)
    statistics = updated_statistics(head.config, statistics, e, w, among)
    wanted = oracle_losses(head.config, statistics, e, w, among).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-5)
    assert_near(embeddings.grad, e.grad)
    assert_near(head.gradient(), w.grad)


def test_accumulated_gradients_are_their_sum(name):
    for rate in (1.0, 0.3):
        head = make(name, classes=50, sample_rate=rate)
        optimizer = HeadSGD(head, momentum=0.0, weight_decay=0.0)
        embeddings, labels = batch(head)
        parts = []
        for step in (0, 1):
            head(embeddings[step::2][:4], labels[step::2][:4], step=0, update_statistics=True).backward()
            parts.append(head.weight.grad.to_dense().clone())
        before = head.weight.detach().clone()
        assert head.gradient().square().sum().item() == pytest.approx(parts[1].square().sum().item(), rel=1e-5)
        optimizer.step(1.0)
        torch.testing.assert_close(before - head.weight.detach(), parts[1], rtol=1e-4, atol=1e-6)
        assert not torch.equal(parts[0], parts[1])
