"""Margins and head against formulas written independently in float64, values and gradients."""

import math

import numpy as np
import pytest
import torch

from aroface.config.schema import AdaFaceConfig, ArcFaceConfig
from aroface.errors import ConfigError
from aroface.heads import HeadSGD, ada_margin, arc_margin, build_head, class_range
from aroface.heads.margins import ada_scaler

ANGLES = [0.0, 0.05, 0.35, 1.25, 2.0, math.pi - 0.51, math.pi - 0.49, 3.0, math.pi]


def arcface(theta, m):
    return math.cos(theta + m) if theta + m <= math.pi else -2 - math.cos(theta + m)


@pytest.mark.parametrize("theta", ANGLES)
def test_arcface_value(theta):
    cosine = torch.tensor([math.cos(theta)], dtype=torch.float64)
    # sin(acos(cos)) is exact to half the digits only at the ends of the range
    assert arc_margin(cosine, 0.5).item() == pytest.approx(arcface(theta, 0.5), abs=2e-6)


def test_arcface_falls_all_the_way():
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert (arc_margin(cosines, 0.5).diff() > 0).all()


@pytest.mark.parametrize("degrees", [20, 72])
def test_gradient_of_the_margin_exact_and_straight_through(degrees):
    theta, m = math.radians(degrees), 0.5
    for gradient, expected in (("exact", math.sin(theta + m) / math.sin(theta)), ("straight_through", 1.0)):
        cosine = torch.tensor([math.cos(theta)], dtype=torch.float64, requires_grad=True)
        value = arc_margin(cosine, m, gradient=gradient)
        assert value.item() == pytest.approx(math.cos(theta + m))
        assert torch.autograd.grad(value.sum(), cosine)[0].item() == pytest.approx(expected)


def test_exact_gradient_at_the_figures_of_the_literature():
    assert math.sin(math.radians(72) + 0.5) / math.sin(math.radians(72)) == pytest.approx(1.03, abs=0.005)
    assert math.sin(math.radians(20) + 0.5) / math.sin(math.radians(20)) == pytest.approx(2.2, abs=0.01)


def test_zero_margin_is_the_cosine():
    cosines = torch.linspace(-0.99, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(arc_margin(cosines, 0.0), cosines)
    torch.testing.assert_close(ada_margin(cosines, 0.0, torch.zeros(50)), cosines)


@pytest.mark.parametrize("norm", [0.0, 5.0, 20.0, 45.0, 1e6])
@pytest.mark.parametrize("theta", [0.01, 0.8, 2.0, 3.1])
def test_adaface_value(norm, theta):
    mean, std, h, m = 20.0, 9.0, 0.333, 0.4
    scaler = max(-1.0, min(1.0, (min(max(norm, 1e-3), 100) - mean) / (std + 1e-3) * h))
    clipped = math.acos(max(-1 + 1e-3, min(1 - 1e-3, math.cos(theta))))
    expected = math.cos(max(1e-3, min(math.pi - 1e-3, clipped - m * scaler))) - (m + m * scaler)
    found_scaler = ada_scaler(torch.tensor([norm]), torch.tensor(mean), torch.tensor(std), h)
    found = ada_margin(torch.tensor([math.cos(theta)], dtype=torch.float64), m, found_scaler.double())
    assert found.item() == pytest.approx(expected, abs=1e-6)


def oracle_losses(embeddings, weights, labels, s, margin):
    """Softmax cross-entropy in float64, the logits written out one by one."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    centres = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    losses = []
    for row, label in zip(unit, labels, strict=True):
        logits = [s * float(row @ centre) for centre in centres]
        logits[label] = s * arcface(math.acos(max(-1, min(1, logits[label] / s))), margin)
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(v - top) for v in logits)) - logits[label])
    return np.array(losses)


def make_head(kind=ArcFaceConfig, classes=23, dim=12, **settings):
    tag = "arcface" if kind is ArcFaceConfig else "adaface"
    settings = {"logit_scale": 16.0, "margin": 0.4} | settings
    return build_head(kind(kind=tag, **settings), num_classes=classes, embedding_dim=dim, seed=1)


@pytest.mark.parametrize("chunk", [1, 5, 8192])
@pytest.mark.parametrize("batch", [1, 9])
def test_loss_equals_the_oracle_for_any_chunk(chunk, batch):
    head = make_head(chunk_classes=chunk)
    generator = torch.Generator().manual_seed(2)
    embeddings = 7 * torch.randn(batch, 12, generator=generator)
    labels = torch.randint(0, 23, (batch,), generator=generator)
    expected = oracle_losses(embeddings.double().numpy(), head.weight.detach().double().numpy(), labels, 16.0, 0.4)
    np.testing.assert_allclose(head.losses(embeddings, labels, step=0).detach(), expected, rtol=2e-5)


@pytest.mark.parametrize("chunk", [4, 8192])
def test_gradients_equal_autograd_of_the_plain_formula_in_float64(chunk):
    head = make_head(chunk_classes=chunk)
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(9, 12, generator=generator, requires_grad=True)
    labels = torch.randint(0, 23, (9,), generator=generator)
    head(embeddings, labels, step=0).backward()
    e = embeddings.detach().double().requires_grad_()
    w = head.weight.detach().double().requires_grad_()
    cosines = torch.nn.functional.normalize(e) @ torch.nn.functional.normalize(w).T
    rows = torch.arange(9)
    shifted = torch.cos(torch.acos(cosines[rows, labels]) + 0.4)
    logits = 16.0 * cosines.index_put((rows, labels), shifted)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    # fp32 sums of 12 and 23 terms against float64
    torch.testing.assert_close(embeddings.grad.double(), e.grad, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), w.grad, rtol=2e-4, atol=1e-5)


def test_zero_embedding_gives_a_finite_loss_and_gradient():
    for kind in (ArcFaceConfig, AdaFaceConfig):
        head = make_head(kind)
        embeddings = torch.zeros(2, 12, requires_grad=True)
        head(embeddings, torch.tensor([0, 1]), step=0).backward()
        assert torch.isfinite(embeddings.grad).all()
        assert torch.isfinite(head.weight.grad).all()


def test_embedding_on_its_centre_and_opposite_to_it():
    head = make_head()
    for sign in (1.0, -1.0):
        embeddings = (sign * head.weight.detach()[:2]).clone().requires_grad_()
        loss = head(embeddings, torch.tensor([0, 1]), step=0)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(embeddings.grad).all()


def test_adaface_statistics_follow_training_but_not_the_attack():
    head = make_head(AdaFaceConfig, statistics_momentum=0.1)
    embeddings = 4 * torch.randn(8, 12)
    norms = embeddings.norm(dim=1)
    head(embeddings, torch.zeros(8, dtype=torch.int64), step=0, update_statistics=False)
    assert (float(head.kind.norm_mean), float(head.kind.norm_std)) == (20.0, 100.0)
    head(embeddings, torch.zeros(8, dtype=torch.int64), step=0)
    assert float(head.kind.norm_mean) == pytest.approx(0.9 * 20 + 0.1 * float(norms.mean()))
    assert float(head.kind.norm_std) == pytest.approx(0.9 * 100 + 0.1 * float(norms.std()))


def test_adaface_with_a_single_image_keeps_its_spread():
    head = make_head(AdaFaceConfig)
    head(torch.randn(1, 12), torch.zeros(1, dtype=torch.int64), step=0)
    assert float(head.kind.norm_std) == 100.0


def test_attack_pass_gives_the_centres_no_gradient():
    head = make_head()
    embeddings = torch.randn(4, 12, requires_grad=True)
    head(embeddings, torch.arange(4), step=0, update_statistics=False).backward()
    assert head.weight.grad is None or not head.weight.grad.any()
    assert embeddings.grad.abs().sum() > 0


def test_sampling_keeps_positives_updates_only_the_sample_and_repeats():
    def trained(step):
        head = make_head(classes=200, sample_rate=0.1)
        optimizer = HeadSGD(head, momentum=0.9, weight_decay=1e-2)
        before = head.weight.detach().clone()
        head(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), torch.arange(6) * 30, step=step).backward()
        sampled = head.weight.grad.coalesce().indices()[0]
        optimizer.step(0.1)
        return sampled, (head.weight.detach() != before).any(1).nonzero().squeeze(1)

    sampled, changed = trained(0)
    assert len(sampled) == 20
    assert set((torch.arange(6) * 30).tolist()) <= set(sampled.tolist())
    assert torch.equal(sampled, changed)
    assert torch.equal(trained(0)[0], sampled)
    assert not torch.equal(trained(1)[0], sampled)


def test_head_sgd_equals_torch_sgd():
    head = make_head()
    twin = torch.nn.Parameter(head.weight.detach().clone())
    optimizer = HeadSGD(head, momentum=0.9, weight_decay=5e-4)
    reference = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(4):
        gradient = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(step))
        head.weight.grad, twin.grad = gradient.clone(), gradient.clone()
        optimizer.step(0.1)
        reference.step()
    torch.testing.assert_close(head.weight.detach(), twin.detach(), rtol=1e-6, atol=1e-7)


def test_first_weights_do_not_depend_on_the_ranks():
    whole = make_head(classes=9000).weight
    for world in (2, 3):
        parts = [
            build_head(whole_config(), num_classes=9000, embedding_dim=12, seed=1, rank=rank, world_size=world).weight
            for rank in range(world)
        ]
        assert torch.equal(torch.cat(parts), whole)


def whole_config():
    return ArcFaceConfig(kind="arcface", logit_scale=16.0, margin=0.4)


def test_class_ranges_cover_every_class_once():
    for classes, world in ((10, 3), (7, 7), (100, 8)):
        ranges = [class_range(classes, rank, world) for rank in range(world)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(classes))
    with pytest.raises(ConfigError, match="2 classes cannot be shared out over 3 ranks"):
        class_range(2, 0, 3)
