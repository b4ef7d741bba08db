"""Random changes of face crops, on the device and deterministic given the generator.

Photometric, crop and low-resolution changes follow the idea of AdaFace (arXiv:2204.00964, Sec. 4), which trains with
each on a fifth of the images.

Legend: B images, H W height and width.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from aroface.config.schema import AugmentConfig

__all__ = ["augment"]

#: Sides that low-resolution images are shrunk to, as shares of the full side.
_LOW_SIDES = (0.2, 0.3, 0.4, 0.55, 0.75)
_BLACK = -1.0


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Apply every configured change, each to a random part of the batch.

    Args:
        images: (B, 3, H, W) float in [-1, 1].
        config: probability of each change per image.
        generator: on the device of the images.

    Returns:
        (B, 3, H, W) float in [-1, 1]; the input is not modified.
    """
    chosen = torch.rand(6, len(images), generator=generator, device=images.device)
    if config.flip:
        images = torch.where(_mask(chosen[0] < config.flip), images.flip(3), images)
    if config.crop:
        images = _outside(images, chosen[1] < config.crop, (0.2, 1.0), generator, keep_inside=True)
    if config.low_resolution:
        images = _low_resolution(images, chosen[2] < config.low_resolution, generator)
    if config.photometric:
        images = _photometric(images, chosen[3] < config.photometric, generator)
    if config.grey:
        images = torch.where(_mask(chosen[4] < config.grey), images.mean(1, keepdim=True), images)
    if config.erase:
        images = _outside(images, chosen[5] < config.erase, (0.02, 0.25), generator, keep_inside=False)
    return images


def _mask(chosen: Tensor) -> Tensor:
    return chosen.view(-1, 1, 1, 1)


def _uniform(images: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """(B, 1, 1, 1) uniform numbers."""
    return _mask(torch.rand(len(images), generator=generator, device=images.device)) * (high - low) + low


def _outside(
    images: Tensor, chosen: Tensor, area: tuple[float, float], generator: torch.Generator, *, keep_inside: bool
) -> Tensor:
    """Blacken the outside of a random rectangle, or its inside."""
    height, width = images.shape[2:]
    share = _uniform(images, generator, *area)
    aspect = torch.exp(_uniform(images, generator, -0.29, 0.29))  # 3:4 to 4:3
    half_w = (share * aspect).sqrt().clamp_max(1) / 2
    half_h = (share / aspect).sqrt().clamp_max(1) / 2
    centre_x = half_w + _uniform(images, generator, 0, 1) * (1 - 2 * half_w)
    centre_y = half_h + _uniform(images, generator, 0, 1) * (1 - 2 * half_h)
    x = ((torch.arange(width, device=images.device) + 0.5) / width).view(1, 1, 1, -1)
    y = ((torch.arange(height, device=images.device) + 0.5) / height).view(1, 1, -1, 1)
    inside = ((x - centre_x).abs() <= half_w) & ((y - centre_y).abs() <= half_h)
    black = ~inside if keep_inside else inside
    return images.masked_fill(black & _mask(chosen), _BLACK)


def _low_resolution(images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Average over areas down to a smaller side and go back bilinearly."""
    side = torch.randint(len(_LOW_SIDES), (len(images),), generator=generator, device=images.device)
    shrink = _shrink_chosen if images.device.type == "cpu" else _shrink_all
    return shrink(images, chosen, side)


def _shrink_chosen(images: Tensor, chosen: Tensor, side: Tensor) -> Tensor:
    """Only the chosen images, side by side: least arithmetic, but the host has to know which they are."""
    result = images.clone()
    height, width = images.shape[2:]
    for index, share in enumerate(_LOW_SIDES):
        rows = (chosen & (side == index)).nonzero().squeeze(1)
        if len(rows):
            small = functional.interpolate(
                images[rows], size=(max(1, round(height * share)), max(1, round(width * share))), mode="area"
            )
            result[rows] = functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    return result


def _shrink_all(images: Tensor, chosen: Tensor, side: Tensor) -> Tensor:
    """The same without a host synchronisation: both steps are linear along each axis, so they are a matrix there."""
    along_y, along_x = (_down_and_up(length, images.device)[side, None] for length in images.shape[2:])
    return torch.where(_mask(chosen), along_y @ images @ along_x.mT, images)


@functools.lru_cache(maxsize=8)
def _down_and_up(length: int, device: torch.device) -> Tensor:
    """(sides, length, length) matrices that shrink an axis to each of `_LOW_SIDES` and stretch it again."""
    identity = torch.eye(length, device=device)[None, None]
    matrices = []
    for share in _LOW_SIDES:
        small = functional.interpolate(identity, size=(max(1, round(length * share)), length), mode="area")
        matrices.append(functional.interpolate(small, size=(length, length), mode="bilinear", align_corners=False))
    return torch.cat(matrices, 1)[0]


def _photometric(images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation, each within 20-30 %."""
    brightness = _uniform(images, generator, -0.25, 0.25)
    contrast = _uniform(images, generator, 0.7, 1.3)
    saturation = _uniform(images, generator, 0.6, 1.4)
    grey = images.mean(1, keepdim=True)
    coloured = grey + (images - grey) * saturation
    mean = coloured.mean((1, 2, 3), keepdim=True)
    changed = (mean + (coloured - mean) * contrast + brightness).clamp(-1, 1)
    return torch.where(_mask(chosen), changed, images)
