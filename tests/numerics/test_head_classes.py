"""The classes of a head: their ranges, first weights, sampling, optimiser, and settings that are refused."""

import re

import pytest
import torch
from pydantic import BaseModel

from aroface.config.head import HeadConfig
from aroface.config.load import parse_config
from aroface.config.schema import ArcFaceConfig
from aroface.errors import ConfigError
from aroface.heads import HeadSGD, build_head, class_range
from aroface.heads.products import cosines_of
from aroface.heads.softmax import SoftmaxSettings, class_terms, target_cosines
from launch.plan.backbone import StorageMeter


class Holder(BaseModel):
    head: HeadConfig


def arcface(**settings):
    return ArcFaceConfig(kind="arcface", **{"logit_scale": 16.0, "margin": 0.4} | settings)


def make_head(classes=23, dim=12, rank=0, world_size=1, **settings):
    return build_head(
        arcface(**settings), num_classes=classes, embedding_dim=dim, seed=1, rank=rank, world_size=world_size
    )


def test_sampling_keeps_positives_updates_only_the_sample_and_repeats():
    def trained(step):
        head = make_head(classes=200, sample_rate=0.1)
        optimizer = HeadSGD(head, momentum=0.9, weight_decay=1e-2)
        before = head.weight.detach().clone()
        head(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), torch.arange(6) * 30, step=step).backward()
        sampled = head.weight.grad.coalesce().indices()[0]
        optimizer.step(0.1)
        assert head.gradient() is None
        return sampled, (head.weight.detach() != before).any(1).nonzero().squeeze(1)

    sampled, changed = trained(0)
    assert len(sampled) == 20
    assert set((torch.arange(6) * 30).tolist()) <= set(sampled.tolist())
    assert torch.equal(sampled, changed)
    assert torch.equal(trained(0)[0], sampled)
    assert not torch.equal(trained(1)[0], sampled)


def test_more_positives_than_the_sample_are_all_kept():
    head = make_head(classes=100, sample_rate=0.05)
    head(torch.randn(30, 12), torch.arange(30) * 3, step=0).backward()
    assert head.weight.grad.coalesce().indices()[0].tolist() == list(range(0, 90, 3))


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_gradient_is_what_can_be_scaled_in_place(rate):
    """As for clipping: what `gradient` returns is the gradient itself."""
    heads = [make_head(classes=50, sample_rate=rate) for _ in range(2)]
    for factor, head in zip((1.0, 0.5), heads, strict=True):
        assert head.gradient() is None
        head(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), torch.arange(6), step=0).backward()
        head.gradient().mul_(factor)
        HeadSGD(head, momentum=0.0, weight_decay=0.0).step(1.0)
    start = make_head(classes=50).weight
    torch.testing.assert_close(start - heads[1].weight, 0.5 * (start - heads[0].weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_head_sgd_equals_torch_sgd_on_the_sampled_rows(rate):
    head = make_head(sample_rate=rate)
    weights, momenta = head.weight.detach().clone(), torch.zeros(23, 12)
    optimizer = HeadSGD(head, momentum=0.9, weight_decay=5e-4)
    for step in range(5):
        head(torch.randn(4, 12, generator=torch.Generator().manual_seed(step)), torch.arange(4), step=step).backward()
        values = head.gradient().clone()
        rows = head.weight.grad.indices()[0] if rate < 1 else torch.arange(23)
        optimizer.step(0.1)
        twin = torch.nn.Parameter(weights[rows])
        reference = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=5e-4)
        reference.state[twin]["momentum_buffer"] = momenta[rows]
        twin.grad = values
        reference.step()
        weights[rows], momenta[rows] = twin.detach(), reference.state[twin]["momentum_buffer"]
    torch.testing.assert_close(head.weight.detach(), weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.momentum_buffer, momenta, rtol=1e-6, atol=1e-7)


def test_the_loss_falls():
    head = make_head()
    optimizer = HeadSGD(head, momentum=0.9, weight_decay=5e-4)
    embeddings, labels = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16)
    losses = []
    for step in range(30):
        loss = head(embeddings, labels, step=step)
        loss.backward()
        optimizer.step(0.01)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_first_weights_do_not_depend_on_the_ranks():
    whole = make_head(classes=9000).weight
    for world in (2, 3):
        parts = [make_head(classes=9000, rank=rank, world_size=world).weight for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)


def test_class_ranges_cover_every_class_once():
    for classes, world in ((10, 3), (7, 7), (100, 8)):
        ranges = [class_range(classes, rank, world) for rank in range(world)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(classes))
    with pytest.raises(ConfigError, match="2 classes cannot be shared out over 3 ranks"):
        class_range(2, 0, 3)


def test_target_cosines_alone_equal_those_with_the_softmax():
    embeddings = torch.nn.functional.normalize(torch.randn(7, 12))
    weights, targets = torch.randn(20, 12), torch.tensor([0, 19, -1, 7, 7, -1, 3])
    alone = target_cosines(embeddings, weights, targets)
    assert torch.equal(alone, class_terms(embeddings, weights, targets, SoftmaxSettings(16.0, 4))[1])
    assert torch.equal(alone == 0, targets < 0)


@pytest.mark.parametrize("classes", [8192, 8193])
def test_the_chunk_that_is_chosen_changes_nothing(classes):
    losses = []
    for chunk in (None, 3000):
        head = make_head(classes=classes, chunk_classes=chunk)
        embeddings = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = head(embeddings, torch.arange(5) * 2000, step=0)
        loss.backward()
        losses.append((loss.detach(), embeddings.grad, head.weight.grad))
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def peak_beside_the_gradient(images, classes, chunk, **settings):
    """Bytes of a step at their most, without the gradient of the centres."""
    head = make_head(classes=classes, chunk_classes=chunk, **settings)
    embeddings = torch.randn(images, 12, requires_grad=True)
    with StorageMeter([head.weight, embeddings]) as meter:
        head(embeddings, torch.arange(images), step=0).backward()
    return meter.peak - head.gradient().nbytes


@pytest.mark.parametrize("settings", [{}, {"logit_precision": "bf16"}])
def test_memory_follows_the_chunk_and_not_images_times_classes(settings):
    small, large = (peak_beside_the_gradient(256, classes, 1024, **settings) for classes in (10_240, 40_960))
    assert small == large
    assert peak_beside_the_gradient(256, 10_240, 10_240, **settings) > 5 * small


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "arcface", "margin": 3.0}, "head.margin = 3.0: input should be less than or equal to 1.57"),
        ({"kind": "cosface", "margin": 35.0}, "head.margin = 35.0"),
        ({"kind": "combined", "m1": 0.9}, "head.m1 = 0.9: input should be greater than or equal to 1"),
        ({"kind": "combined", "continuation": "linear"}, "head.continuation = 'linear': input should be 'reflect' or"),
        ({"kind": "magface", "margin_gradient": "straight_through"}, "head.margin_gradient"),
        ({"kind": "magface", "lower_norm": 110.0}, "lower_norm = 110.0 is not below upper_norm = 110.0; MagFace uses"),
        ({"kind": "magface", "lower_margin": 0.9}, "lower_margin = 0.9 is not below upper_margin = 0.8"),
        ({"kind": "curricularface", "interclass_filter": 0.5}, "head.interclass_filter is not a setting"),
        ({"kind": "arcface", "margin": 0.5, "logit_scale": 1000.0}, "head.logit_scale = 1000.0"),
        ({"kind": "arcface", "margin": 0.5, "logit_precision": "fp16"}, "input should be 'fp32' or 'bf16'"),
        ({"kind": "curriculaface"}, "curricularface"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({"head": settings}, Holder, name="test")


def test_kinds_with_nothing_but_their_name_are_those_of_their_papers():
    curricular, mag = (
        parse_config({"head": {"kind": kind}}, Holder, name="test").head for kind in ("curricularface", "magface")
    )
    assert (curricular.margin, curricular.logit_scale, curricular.statistics_momentum) == (0.5, 64.0, 0.01)
    assert (mag.lower_norm, mag.upper_norm, mag.lower_margin, mag.upper_margin) == (10.0, 110.0, 0.45, 0.8)


def test_bf16_rounds_the_factors_of_the_logits_and_nothing_else():
    rows, centres = (torch.nn.functional.normalize(torch.randn(count, 64)) for count in (32, 48))
    before = torch.get_float32_matmul_precision()
    found = cosines_of(rows, centres, "bf16").double()
    rounded = rows.bfloat16().double() @ centres.bfloat16().double().T
    exact = rows.double() @ centres.double().T  # what a processor without bf16 units computes
    assert min((found - rounded).abs().max(), (found - exact).abs().max()) < 1e-6
    assert torch.get_float32_matmul_precision() == before
    torch.testing.assert_close((rows @ centres.T).double(), exact, rtol=0, atol=1e-6)
