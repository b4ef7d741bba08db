"""The published attack, fault by fault; each is pinned against an independent calculation."""

import pytest
import torch
from torch import nn

from aroface.alignment import Alignment, draw_release, identity_alignment, release_counts, release_mix
from aroface.alignment.release import ReleaseDraws, release_warp
from aroface.config.schema import AlignmentConfig


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**changes):
    return AlignmentConfig(kind="adversarial", release_compat=True, **changes)


def test_identity_is_a_zoom_out_with_a_black_border():
    """The grid of S pixels is laid over S + 2: pixel i reads (i + 0.5) (S + 2) / S - 0.5 of the padded image."""
    size = 16
    ramp = torch.arange(size, dtype=torch.float64).expand(1, 3, size, size)
    found = release_warp(ramp, identity_alignment(1, dtype=torch.float64))[0, 0, size // 2]
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * (size + 2) / size - 0.5 - 1
    inner = (places >= 0) & (places <= size - 1)
    torch.testing.assert_close(found[inner], places[inner])
    assert inner.sum() == size - 2
    assert (found[~inner] < places[~inner].clamp(0, size - 1) + 1e-9).all()


@pytest.mark.parametrize(("share", "fits"), [(0.25, True), (0.5, True), (0.3, False), (0.4, False), (0.1, False)])
def test_only_some_shares_keep_the_batch(share, fits):
    assert (sum(release_counts(128, share)) == 128) is fits


def test_images_are_drawn_twice_independently():
    draws = draw_release(128, config(), generator())
    assert len(draws.clean.unique()) == 96
    assert len(draws.warped.unique()) == 32
    unused, both = [], []
    for seed in range(200):
        draws = draw_release(128, config(), generator(seed))
        clean, warped = set(draws.clean.tolist()), set(draws.warped.tolist())
        unused.append(128 - len(clean | warped))
        both.append(len(clean & warped))
    assert sum(unused) / 200 / 128 == pytest.approx(0.1875, abs=0.01)
    assert sum(both) / 200 / 128 == pytest.approx(0.1875, abs=0.01)


def test_step_sizes_are_drawn_once_per_step():
    etas = torch.tensor([draw_release(4, config(), generator(seed)).etas for seed in range(2000)])
    assert etas.mean(0).tolist() == pytest.approx([0.1] * 3, abs=1e-4)
    assert etas.std(0).tolist() == pytest.approx([0.001] * 3, rel=0.1)


def smooth_images(count):
    side = torch.linspace(-2, 2, 24)
    phases = torch.rand(count, 3, 1, 1, generator=generator(7)) * 3
    return torch.sin(side[None, None, :, None] + phases) * torch.cos(side[None, None, None] - phases)


def test_one_step_moves_every_parameter_by_its_step_along_the_gradient():
    images, target = smooth_images(8), smooth_images(8).roll(2, 3)
    draws = draw_release(8, config(), generator())

    def loss(x, y):
        return (x - target).square().mean((1, 2, 3))

    start = Alignment(*(part.double() for part in draws.start))
    expected = []
    for parameter in range(4):
        differences = []
        for eps in (1e-4, -1e-4):
            parts = [start.scale.clone(), start.angle_rad.clone(), start.shift.clone()]
            if parameter < 2:
                parts[parameter] += eps
            else:
                parts[2][:, parameter - 2] += eps
            differences.append(loss(release_warp(images.double(), Alignment(*parts)), None))
        expected.append((differences[0] - differences[1]).sign())
    moved = Alignment(
        draws.start.scale + draws.etas[0] * expected[0].float(),
        draws.start.angle_rad + draws.etas[1] * expected[1].float(),
        draws.start.shift + draws.etas[2] * torch.stack(expected[2:], 1).float(),
    )
    mix = release_mix(images, torch.arange(8), loss_of=loss, config=config(), draws=draws)
    assert mix.labels.tolist() == [*draws.clean.tolist(), *draws.warped.tolist()]
    assert torch.equal(mix.images[:6], images[draws.clean])
    torch.testing.assert_close(mix.images[6:], release_warp(images, moved)[draws.warped], atol=1e-5, rtol=0)


def test_shift_is_clipped_by_the_start_of_the_angle():
    """Ten steps to the right end at theta_0 + 0.3, where a clip by the start of the shift would end at t_0 + 0.3."""
    start = Alignment(torch.ones(2), torch.tensor([0.2, -0.1]), torch.zeros(2, 2))
    every = torch.arange(2)
    draws = ReleaseDraws((0.0, 0.0, 0.1), start, every[:0], every)
    seen = []
    ramp = torch.linspace(-1, 1, 24)

    def loss(x, y):
        seen.append(x.detach())
        return -(x * (ramp + ramp[:, None])).sum((1, 2, 3))  # pushes the content up and left: both shifts grow

    images = (2 * torch.exp(-(ramp**2 + ramp[:, None] ** 2) / 0.05) - 1).expand(2, 3, -1, -1).contiguous()
    mix = release_mix(images, every, loss_of=loss, config=config(steps=10), draws=draws)
    ends = Alignment(torch.ones(2), start.angle_rad, torch.tensor([[0.5, 0.5], [0.2, 0.2]]))
    assert len(seen) == 10
    torch.testing.assert_close(mix.images, release_warp(images, ends), atol=1e-5, rtol=0)


def test_attack_pass_trains_the_running_statistics():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).train()
    images = smooth_images(8)
    release_mix(
        images,
        torch.arange(8),
        loss_of=lambda x, y: net(x).square().sum(1),
        config=config(),
        draws=draw_release(8, config(), generator()),
    )
    assert net[0].num_batches_tracked == 1
    assert net[0].running_mean.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
