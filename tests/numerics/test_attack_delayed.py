"""The delayed attack: its direction against finite differences, which images it carries, and what it hands on."""

import pytest
import torch
from torch import nn

from aroface.alignment import Alignment, DelayedAttack, alignment_gradient, delayed, landmark_displacement_px, warp
from aroface.alignment.attack import start_alignment, step_along
from aroface.config.schema import AlignmentConfig

FILL = -1.0


def config(**changes):
    return AlignmentConfig(kind="delayed", **changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(parameter, distance):
    psi = [torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2).double()]
    if parameter < 2:
        psi[parameter] += distance
    else:
        psi[2][:, parameter - 2] += distance
    return Alignment(*psi)


@pytest.mark.parametrize("size", [(16, 16), (11, 18)])
def test_analytic_gradient_equals_finite_differences_of_the_warp(size):
    images = torch.randn(2, 3, *size, generator=generator()).double()
    weights = torch.randn(2, 3, *size, generator=generator(1)).double()

    def losses(psi):
        return (warp(images, psi, fill=FILL) * weights).sum((1, 2, 3))

    found = alignment_gradient(images, weights, fill=FILL)
    for parameter in range(4):
        eps = 1e-6
        expected = (losses(moved(parameter, eps)) - losses(moved(parameter, -eps))) / (2 * eps)
        torch.testing.assert_close(found[:, parameter].double(), expected, rtol=1e-4, atol=1e-3)


def run(attack, images, labels, *, micro_step, gradients):
    """One micro-batch with a loss whose input gradient is `gradients`; returns the mixed batch."""
    draw = generator(micro_step)
    mixed = attack.mix(images, labels, micro_step=micro_step, generator=draw)
    leaf = attack.watch(mixed, micro_step=micro_step, generator=draw)
    (leaf * gradients).sum().backward()
    return mixed


def batch(step, count=8):
    """Images that can be told apart by their label."""
    return torch.randn(count, 3, 12, 12, generator=generator(100 + step)), torch.arange(count) + 100 * step


def test_first_batch_is_untouched_and_the_next_has_exactly_its_share():
    attack = DelayedAttack(config(share=0.25), slots=1, fill=FILL)
    images, labels = batch(0)
    first = run(attack, images, labels, micro_step=0, gradients=torch.randn(8, 3, 12, 12))
    assert torch.equal(first.images, images)
    assert torch.equal(first.labels, labels)
    images, labels = batch(1)
    second = run(attack, images, labels, micro_step=1, gradients=torch.randn(8, 3, 12, 12))
    assert len(second.images) == 8
    assert len(second.warped.unique()) == 2
    kept = [place for place in range(8) if place not in second.warped.tolist()]
    assert torch.equal(second.images[kept], images[kept])
    assert torch.equal(second.labels[kept], labels[kept])
    assert len(second.labels.unique()) == 8
    assert set(second.labels[second.warped].tolist()) <= set(range(8))


def test_carried_images_come_back_warped_along_the_sign_of_their_gradient():
    settings = config(share=0.5)
    attack = DelayedAttack(settings, slots=1, fill=FILL)
    images, labels = batch(0)
    gradients = torch.randn(8, 3, 12, 12, generator=generator(3))
    run(attack, images, labels, micro_step=0, gradients=gradients)
    draw = generator(1)
    mixed = attack.mix(*batch(1), micro_step=1, generator=draw)
    sources = mixed.labels[mixed.warped]  # labels of the first batch are the places in it
    expected_signs = alignment_gradient(images[sources], gradients[sources], fill=FILL).sign()
    draw = generator(1)
    torch.randperm(8, generator=draw)
    psi = step_along(start_alignment(4, settings, draw), expected_signs, settings)
    torch.testing.assert_close(mixed.images[mixed.warped], warp(images[sources], psi, fill=FILL))


@pytest.mark.parametrize("budget_px", [None, 3.0])
def test_bounds_hold_for_every_parameter_and_for_the_budget(monkeypatch, budget_px):
    """Boxes and budget below the step, with a start noise that by itself would leave the box."""
    settings = config(
        share=0.5,
        landmark_budget_px=budget_px,
        **{"start_noise": 0.02, "scale_step": 0.05, "angle_step_rad": 0.06, "shift_step": 0.04},
        **{"scale_box": 0.05, "angle_box_rad": 0.06, "shift_box": 0.04},
    )
    seen = []

    def recorded(images, psi, **options):
        seen.append(psi)
        return warp(images, psi, **options)

    monkeypatch.setattr(delayed, "warp", recorded)
    attack = DelayedAttack(settings, slots=1, fill=FILL)
    for step in range(20):
        run(attack, *batch(step), micro_step=step, gradients=torch.randn(8, 3, 12, 12, generator=generator(step)))
    psi = Alignment(*(torch.cat(parts) for parts in zip(*(p for p in seen if not p.scale.requires_grad), strict=True)))
    assert len(psi.scale) >= 4 * 19
    assert ((psi.scale - 1).abs() <= 0.05 + 1e-6).all()
    assert (psi.angle_rad.abs() <= 0.06 + 1e-6).all()
    assert (psi.shift.abs() <= 0.04 + 1e-6).all()
    if budget_px:
        assert landmark_displacement_px(psi).max() <= budget_px + 1e-4


def test_only_clean_images_are_carried_on():
    attack = DelayedAttack(config(share=0.5), slots=1, fill=FILL)
    for step in range(6):
        images, labels = batch(step)
        mixed = run(attack, images, labels, micro_step=step, gradients=torch.randn(8, 3, 12, 12))
        assert (mixed.labels[mixed.warped] // 100 == step - 1).all()


def test_every_image_is_visited_once_per_epoch_in_expectation():
    attack = DelayedAttack(config(share=0.25), slots=1, fill=FILL)
    visits, warped = torch.zeros(8 * 400), 0
    for step in range(400):
        images = torch.zeros(8, 3, 4, 4)
        mixed = run(attack, images, torch.arange(8) + 8 * step, micro_step=step, gradients=torch.randn(8, 3, 4, 4))
        visits[mixed.labels] += 1
        warped += len(mixed.warped)
    assert visits.sum() == 8 * 400
    assert warped == 2 * 399
    assert set(visits.unique().tolist()) == {0, 1, 2}
    assert float((visits == 2).float().mean()) == pytest.approx(0.25, abs=0.02)  # p
    assert float((visits == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_accumulation_keeps_both_visits_in_different_optimiser_steps():
    attack = DelayedAttack(config(share=0.25), slots=3, fill=FILL)
    for micro_step in range(9):
        images, labels = batch(micro_step)
        mixed = run(attack, images, labels, micro_step=micro_step, gradients=torch.randn(8, 3, 12, 12))
        assert len(mixed.warped) == (2 if micro_step >= 3 else 0)
        assert (mixed.labels[mixed.warped] // 100 == micro_step - 3).all()


def test_state_goes_through_a_checkpoint_bit_for_bit():
    first = DelayedAttack(config(), slots=2, fill=FILL)
    for micro_step in range(2):
        run(first, *batch(micro_step), micro_step=micro_step, gradients=torch.randn(8, 3, 12, 12))
    second = DelayedAttack(config(), slots=2, fill=FILL)
    second.load_state_tensors(first.state_tensors(), torch.device("cpu"))
    for micro_step in (2, 3):
        results = [
            attack.mix(*batch(micro_step), micro_step=micro_step, generator=generator(9)) for attack in (first, second)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert len(results[0].warped) == 2


def test_an_overflowed_gradient_gives_no_direction():
    attack = DelayedAttack(config(share=0.5, start_noise=0.0), slots=1, fill=FILL)
    images, labels = batch(0)
    run(attack, images, labels, micro_step=0, gradients=torch.full((8, 3, 12, 12), torch.inf))
    mixed = attack.mix(*batch(1), micro_step=1, generator=generator(1))
    assert torch.equal(mixed.images[mixed.warped], images[mixed.labels[mixed.warped]])


def test_gradients_of_the_weights_are_those_without_the_watch():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 2))
    images, labels = batch(0)
    net(images).square().sum().backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    attack = DelayedAttack(config(), slots=1, fill=FILL)
    mixed = attack.mix(images, labels, micro_step=0, generator=generator())
    net(attack.watch(mixed, micro_step=0, generator=generator())).square().sum().backward()
    assert all(torch.equal(p.grad, expected) for p, expected in zip(net.parameters(), plain, strict=True))
