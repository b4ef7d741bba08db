"""On trained weights: exact, delayed and best-of attacks raise the loss above random misalignments of the same box."""

import pytest
import torch
from torch import nn

from aroface.alignment import (
    alignment_gradient,
    attack_images,
    draw_release,
    frozen_statistics,
    warp,
)
from aroface.alignment.attack import start_alignment, step_along
from aroface.alignment.release import release_attack, release_warp
from aroface.config.schema import AlignmentConfig

CLASSES, SIZE = 10, 32


def drawn(count, seed):
    """Smooth patterns, one per class, shifted and noisy."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    patterns = nn.functional.interpolate(patterns, size=SIZE, mode="bicubic").clamp(-1, 1)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (patterns[labels] + noise).clamp(-1, 1), labels


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.BatchNorm2d(12),
        nn.PReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(24 * 64, CLASSES),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(60):
        images, labels = drawn(32, 100 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net


def increases(net, ways):
    """Mean loss increase of every way over 256 images, running statistics."""
    images, labels = drawn(256, 0)

    def losses(x, y):
        return nn.functional.cross_entropy(net(x), y, reduction="none")

    def mean(x):
        with torch.no_grad(), frozen_statistics(net, "running"):
            return float(losses(x, labels).mean())

    found = {}
    for name, settings in ways.items():
        generator = torch.Generator().manual_seed(7)
        config = AlignmentConfig(**settings)
        with frozen_statistics(net, config.batch_statistics):
            if config.kind == "delayed":
                leaf = images.clone().requires_grad_()
                (gradients,) = torch.autograd.grad(losses(leaf, labels).mean(), leaf)
                signs = alignment_gradient(images, gradients, fill=-1.0).sign()
                warped = warp(images, step_along(start_alignment(256, config, generator), signs, config), fill=-1.0)
            elif config.release_compat:
                draws = draw_release(256, config, generator)
                warped = release_warp(
                    images, release_attack(images, labels, loss_of=losses, config=config, draws=draws)
                )
            else:
                warped = attack_images(images, labels, config=config, loss_of=losses, generator=generator).images
        found[name] = mean(warped) - mean(images)
    return found


def test_every_attack_is_stronger_than_random_on_trained_weights(trained):
    found = increases(
        trained,
        {
            "random": {"kind": "random"},
            "exact": {"kind": "adversarial"},
            "two steps": {"kind": "adversarial", "steps": 2},
            "running": {"kind": "adversarial", "batch_statistics": "running"},
            "delayed": {"kind": "delayed"},
            "best of 2": {"kind": "best_of", "candidates": 2},
            "best of 4": {"kind": "best_of", "candidates": 4},
            "best of 16": {"kind": "best_of", "candidates": 16},
            "elastic": {"kind": "elastic"},
            "published": {"kind": "adversarial", "release_compat": True},
        },
    )
    random = found.pop("random")
    assert random > 0
    assert {name: value for name, value in found.items() if value < 1.1 * random} == {}
    assert found["best of 16"] > found["best of 4"] > found["best of 2"]
    assert found["best of 16"] > found["exact"]
    assert found["two steps"] > found["exact"]
