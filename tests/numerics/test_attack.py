"""The attack: bounds, exact counts, no trace left behind, and that it hurts more than chance."""

import itertools

import pytest
import torch
from torch import nn

from aroface.alignment import (
    find_worst,
    frozen_statistics,
    landmark_displacement_px,
    project,
    realign,
    warp,
    worst_of_corners,
)
from aroface.alignment.attack import random_corner, start_alignment
from aroface.alignment.warp import Alignment
from aroface.config.schema import AlignmentConfig


def config(kind="adversarial", **changes):
    return AlignmentConfig(kind=kind, **changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Centroid(nn.Module):
    """Losses that are smooth in the warp: squared distance of soft moments from those of a target, per image."""

    def forward(self, images, labels):
        weights = (images + 1).mean(1)
        side = torch.linspace(-1, 1, images.shape[-1])
        x = (weights * side).sum((1, 2)) / weights.sum((1, 2))
        y = (weights * side[:, None]).sum((1, 2)) / weights.sum((1, 2))
        spread = (weights * (side**2 + (side[:, None]) ** 2)).sum((1, 2)) / weights.sum((1, 2))
        return (x - 0.3) ** 2 + (y + 0.2) ** 2 + (spread - 0.3) ** 2


def blobs(count=24, size=32):
    side = torch.linspace(-1, 1, size)
    centres = torch.rand(count, 2, generator=generator(5)) * 0.6 - 0.3
    distance = (side[None, None] - centres[:, 0, None, None]) ** 2 + (
        side[None, :, None] - centres[:, 1, None, None]
    ) ** 2
    return (2 * torch.exp(-distance / 0.1) - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("budget", [None, 3.0])
def test_bounds_hold_for_every_parameter_after_every_number_of_steps(steps, budget):
    settings = config(steps=steps, scale_box=0.15, angle_box_rad=0.12, shift_box=0.11, landmark_budget_px=budget)
    images = blobs()
    for psi in (
        find_worst(images, torch.zeros(24), loss_of=Centroid(), config=settings, generator=generator()),
        random_corner(200, settings, generator()),
        worst_of_corners(images, torch.zeros(24), losses_of=Centroid(), config=settings, generator=generator()),
    ):
        assert ((psi.scale - 1).abs() <= 0.15 + 1e-6).all()
        assert (psi.angle_rad.abs() <= 0.12 + 1e-6).all()
        assert (psi.shift.abs() <= 0.11 + 1e-6).all()
        if budget:
            assert landmark_displacement_px(psi).max() <= budget + 1e-4


def test_an_image_whose_gradient_is_no_number_stays_at_its_start():
    """As in the first steps of a deep network with running averages: its sign is 0; NaN would end the run."""
    images, settings = blobs(), config(steps=2)

    def losses(warped, labels):
        return Centroid()(warped, labels) * torch.where(torch.arange(24) % 2 == 0, 1.0, torch.nan)

    psi = find_worst(images, torch.zeros(24), loss_of=losses, config=settings, generator=generator())
    whole = find_worst(images, torch.zeros(24), loss_of=Centroid(), config=settings, generator=generator())
    start = start_alignment(24, settings, generator())
    for found, hurt, began in zip(psi, whole, start, strict=True):
        assert torch.equal(found[::2], hurt[::2])
        assert torch.equal(found[1::2], began[1::2])
        assert not torch.equal(hurt[1::2], began[1::2])


def test_projection_leaves_what_is_inside_alone_and_uses_the_budget():
    inside = Alignment(torch.tensor([1.01]), torch.tensor([0.01]), torch.tensor([[0.01, 0.0]]))
    settings = config(landmark_budget_px=4.0)
    assert all(torch.equal(a, b) for a, b in zip(project(inside, settings), inside, strict=True))
    outside = Alignment(torch.tensor([1.2]), torch.tensor([0.2]), torch.tensor([[0.2, 0.2]]))
    assert landmark_displacement_px(project(outside, settings)).max() == pytest.approx(4.0, abs=1e-3)


def test_attack_hurts_more_than_random_and_at_most_as_the_worst_corner():
    images, loss = blobs(), Centroid()
    settings = config(start_noise=0.0)
    labels = torch.zeros(24)

    def mean_loss(psi):
        return float(loss(warp(images, psi, fill=-1.0), labels).mean())

    attacked = mean_loss(find_worst(images, labels, loss_of=loss, config=settings, generator=generator()))
    random = sum(mean_loss(random_corner(24, settings, generator(seed))) for seed in range(20)) / 20
    worst = losses_of_all_corners(images, loss).amax(1).mean()
    assert attacked > 1.15 * random
    assert attacked <= float(worst) + 1e-6


def losses_of_all_corners(images, loss):
    """(n, 16), by a loop over the corners."""
    columns = []
    for s, a, x, y in itertools.product([-0.1, 0.1], repeat=4):
        count = len(images)
        psi = Alignment(torch.full((count,), 1 + s), torch.full((count,), a), torch.tensor([[x, y]] * count))
        columns.append(loss(warp(images, psi, fill=-1.0), None))
    return torch.stack(columns, 1)


def test_best_of_all_corners_is_the_worst_corner_of_each_image():
    images, loss = blobs(), Centroid()
    settings = config("best_of", candidates=16, start_noise=0.0)
    psi = worst_of_corners(images, torch.zeros(24), losses_of=loss, config=settings, generator=generator())
    found = loss(warp(images, psi, fill=-1.0), None)
    torch.testing.assert_close(found, losses_of_all_corners(images, loss).amax(1))


def test_best_of_tries_different_corners_and_more_of_them_are_worse():
    images, loss = blobs(), Centroid()
    means = []
    for candidates in (1, 4, 16):
        settings, seen = config("best_of", candidates=candidates, start_noise=0.0), []

        def losses_of(warped, labels, seen=seen):
            seen.append(warped)
            return loss(warped, labels)

        psi = worst_of_corners(images, torch.zeros(24), losses_of=losses_of, config=settings, generator=generator())
        assert len(seen) == candidates
        assert all(len(torch.stack([warped[i] for warped in seen]).unique(dim=0)) == candidates for i in range(24))
        means.append(float(loss(warp(images, psi, fill=-1.0), None).mean()))
    assert means[0] < means[1] < means[2]


def test_best_of_one_candidate_is_a_random_corner_in_distribution():
    psi = worst_of_corners(
        torch.zeros(4000, 1, 2, 2),
        torch.zeros(4000),
        losses_of=lambda x, y: x.mean((1, 2, 3)),
        config=config("best_of", candidates=1, start_noise=0.0),
        generator=generator(),
    )
    signs = torch.stack([psi.scale - 1, psi.angle_rad, *psi.shift.T]).sign()
    codes = ((signs + 1) / 2 * torch.tensor([1, 2, 4, 8])[:, None]).sum(0).int()
    assert codes.bincount(minlength=16).min() > 4000 / 16 * 0.7


def test_batch_keeps_its_images_and_warps_the_exact_share():
    images = torch.randn(10, 3, 16, 16)
    for share, expected in ((0.04, 0), (0.25, 2), (0.5, 5), (0.7, 7), (0.9, 9), (1.0, 10)):
        result = realign(
            images, torch.zeros(10), config=config("random", share=share), loss_of=None, generator=generator()
        )
        assert len(result.chosen) == expected
        assert len(result.chosen.unique()) == expected
        untouched = [i for i in range(10) if i not in result.chosen.tolist()]
        assert torch.equal(result.images[untouched], images[untouched])
        assert all(not torch.equal(result.images[i], images[i]) for i in result.chosen.tolist())
        assert torch.equal(result.clean, images[result.chosen])
        if expected:  # each in the place that it was taken from
            torch.testing.assert_close(result.images[result.chosen], warp(result.clean, result.alignment, fill=-1.0))


def test_best_of_looks_at_the_losses_of_its_own_rank():
    """The losses of all ranks come in rank order; those of the others must not choose our corners."""
    images, loss = blobs(), Centroid()

    def of_all_ranks(warped, labels):
        return torch.cat([torch.rand(6) * 100, loss(warped, labels), torch.rand(6) * 100])

    results = [
        realign(images, torch.zeros(24), config=config("best_of"), loss_of=of, generator=generator(), own_rows=rows)
        for of, rows in ((loss, slice(None)), (of_all_ranks, slice(6, 12)))
    ]
    assert torch.equal(results[0].images, results[1].images)


def test_kind_none_returns_the_batch_itself():
    images = torch.randn(4, 3, 16, 16)
    result = realign(images, torch.zeros(4), config=config("none"), loss_of=None, generator=generator())
    assert result.images is images
    assert len(result.chosen) == 0


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 49, 5)
    )


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_attack_leaves_no_trace(mode):
    net = small_net().train()
    images, labels = torch.randn(6, 3, 16, 16), torch.randint(0, 5, (6,))
    net(images)  # statistics that are not the initial ones
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    with frozen_statistics(net, mode):
        find_worst(
            images,
            labels,
            loss_of=lambda x, y: nn.functional.cross_entropy(net(x), y),
            config=config(),
            generator=generator(),
        )
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in net.modules())
    assert net[1].track_running_stats


def test_statistics_are_restored_after_an_error():
    net = small_net().train()
    mean = net[1].running_mean
    with pytest.raises(RuntimeError), frozen_statistics(net, "batch"):
        raise RuntimeError
    assert net[1].running_mean is mean
    assert net[1].track_running_stats


def test_batch_mode_normalises_by_the_batch_and_running_mode_by_the_averages():
    norm = nn.BatchNorm2d(3)
    images = 5 + 2 * torch.randn(64, 3, 8, 8)
    with frozen_statistics(norm, "batch"):
        assert norm(images).mean().abs() < 1e-4
    with frozen_statistics(norm, "running"):
        torch.testing.assert_close(norm(images), images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_a_frozen_batch_norm_stays_frozen(mode):
    net = small_net().eval()
    images = 3 + torch.randn(6, 3, 16, 16)
    expected = net(images)
    with frozen_statistics(net, mode):
        assert torch.equal(net(images), expected)
    assert not any(module.training for module in net.modules())


def test_same_generator_same_attack():
    images, labels = blobs(), torch.zeros(24)
    runs = [find_worst(images, labels, loss_of=Centroid(), config=config(), generator=generator(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
