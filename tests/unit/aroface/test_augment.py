"""Augmentation: its range, its probabilities, and that it repeats."""

import pytest
import torch

from aroface import augment as augmentation
from aroface.augment import augment
from aroface.config.schema import AugmentConfig

OFF = {"flip": 0.0}
KINDS = ["flip", "low_resolution", "photometric", "crop", "erase", "grey"]


def images(count=64):
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_each_change_hits_its_share_stays_in_range_and_leaves_the_input(kind):
    before = images()
    copy = before.clone()
    after = augment(before, AugmentConfig(**(OFF | {kind: 0.5})), generator())
    assert torch.equal(before, copy)
    assert after.shape == before.shape
    assert after.abs().max() <= 1 + 1e-6
    changed = (after != before).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_zero_probability_changes_nothing(kind):
    before = images()
    assert torch.equal(augment(before, AugmentConfig(**(OFF | {kind: 0.0})), generator()), before)


def test_flip_mirrors():
    before = images(4)
    assert torch.equal(augment(before, AugmentConfig(flip=1.0), generator()), before.flip(3))


def test_grey_has_equal_channels():
    after = augment(images(4), AugmentConfig(**(OFF | {"grey": 1.0})), generator())
    assert torch.equal(after[:, 0], after[:, 1])


def test_crop_keeps_pixels_in_place_and_blackens_the_rest():
    before = images(16)
    after = augment(before, AugmentConfig(**(OFF | {"crop": 1.0})), generator())
    assert ((after == before) | (after == -1)).all()


def test_same_generator_same_images():
    config = AugmentConfig(flip=0.5, low_resolution=0.5, photometric=0.5, crop=0.5, erase=0.5, grey=0.5)
    assert torch.equal(augment(images(), config, generator(3)), augment(images(), config, generator(3)))
    assert not torch.equal(augment(images(), config, generator(3)), augment(images(), config, generator(4)))


def test_shrinking_by_matrices_is_shrinking_by_rows():
    """What runs on a GPU against what runs on a CPU; fp32 sums in another order."""
    tall = torch.rand(40, 3, 24, 17, generator=generator(1)) * 2 - 1
    chosen = torch.rand(40, generator=generator(2)) < 0.7
    side = torch.randint(5, (40,), generator=generator(3))
    torch.testing.assert_close(
        augmentation._shrink_all(tall, chosen, side), augmentation._shrink_chosen(tall, chosen, side), rtol=0, atol=1e-6
    )
