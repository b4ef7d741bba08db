"""The attack one step late: its direction is the input gradient that the main pass formed anyway.

Of the images that a step saw clean, a share p is kept together with the sign of d loss / d psi at the identity, which
follows from the gradient of the pixels through the Jacobian of the warp. In the next step they come back warped, in the
places of as many newly drawn images: the batch keeps its B images, and the attack costs no pass of its own. What it
means for the data: a drawn image is replaced with probability p before it is seen, and an image that was seen comes
back warped with probability p / (1 - p), so an image is visited once per epoch in expectation, as without the attack.

Legend: B images of a micro-batch, n carried images, H W height and width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aroface.alignment.attack import start_alignment, step_along
from aroface.alignment.warp import warp
from aroface.config.schema import AlignmentConfig

__all__ = ["Carried", "DelayedAttack", "Mixed", "alignment_gradient"]


def alignment_gradient(images: Tensor, gradients: Tensor, *, fill: float) -> Tensor:
    """Turn d loss / d image into d loss / d psi at the identity: (B, 4) as scale, angle, shift x, shift y.

    The chain rule through x_in = s R(phi) x_out + t, whose derivatives at (1, 0, 0, 0) are (x, y), (-y, x), (1, 0) and
    (0, 1). The slope of the image is the central difference, the mean of the two one-sided derivatives that bilinear
    resampling has at a pixel centre; beyond the border it is black.

    Args:
        images: (B, 3, H, W) that the loss was computed for.
        gradients: (B, 3, H, W) of the loss.
        fill: value outside the image.

    Returns:
        Float32, equal to the two-sided finite difference of the loss of `warp` in the limit of small differences.
    """
    height, width = images.shape[2:]
    work, gradients = (images.float() - fill), gradients.float()
    padded = torch.nn.functional.pad(work, (1, 1, 1, 1))
    # One pixel is 2 / W, so the difference of two pixels apart is divided by 4 / W.
    along_x = (gradients * (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2])).sum(1) * (width / 4)
    along_y = (gradients * (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1])).sum(1) * (height / 4)
    x = (2 * torch.arange(width, device=images.device) + 1) / width - 1
    y = ((2 * torch.arange(height, device=images.device) + 1) / height - 1)[:, None]
    parts = (along_x * x + along_y * y, along_y * x - along_x * y, along_x, along_y)
    return torch.stack([part.sum((1, 2)) for part in parts], 1)


class Carried(NamedTuple):
    """What one micro-batch hands on."""

    images: Tensor  #: (n, 3, H, W) float32, normalised, as they were seen
    labels: Tensor  #: (n,)
    signs: Tensor  #: (n, 4) direction of the ascent, in {-1, 0, 1}


class Mixed(NamedTuple):
    """A micro-batch with its carried images."""

    images: Tensor  #: (B, 3, H, W)
    labels: Tensor  #: (B,)
    warped: Tensor  #: (n,) places of the warped images
    clean: Tensor  #: (n, 3, H, W) the same images before


class DelayedAttack:
    """Keeps the images of one step for the next.

    With accumulation every micro-batch of an optimiser step has a slot of its own, so that the clean and the warped
    visit of an image lie one optimiser step apart, never inside the same one.

    Args:
        config: share, step sizes and bounds.
        slots: micro-batches of an optimiser step.
        fill: value outside the image.
    """

    def __init__(self, config: AlignmentConfig, *, slots: int, fill: float) -> None:
        self._config, self._slots, self._fill = config, slots, fill
        self._carried: dict[int, Carried] = {}

    def mix(self, images: Tensor, labels: Tensor, *, micro_step: int, generator: torch.Generator) -> Mixed:
        """Put the carried images, warped, in the places of randomly chosen new ones; nothing in the first step.

        Args:
            images: (B, 3, H, W) float, normalised.
            labels: (B,) class indices.
            micro_step: counts micro-batches over the whole run.
            generator: of the places and the start; on the device of the images.
        """
        carried = self._carried.get(micro_step % self._slots)
        if carried is None:
            nothing = torch.empty(0, dtype=torch.int64, device=images.device)
            return Mixed(images, labels, nothing, images[:0])
        count = len(carried.labels)
        places = torch.randperm(len(images), generator=generator, device=generator.device)[:count]
        psi = step_along(start_alignment(count, self._config, generator), carried.signs, self._config)
        with torch.no_grad():
            warped = warp(carried.images, psi, fill=self._fill)
            mixed = images.index_copy(0, places, warped.to(images.dtype))
        return Mixed(mixed, labels.index_copy(0, places, carried.labels), places, carried.images)

    def watch(self, batch: Mixed, *, micro_step: int, generator: torch.Generator) -> Tensor:
        """Choose the clean images to carry on, and take their directions when the backward pass gets to them.

        Args:
            batch: of `mix`.
            micro_step: as there.
            generator: of the choice; on the device of the images.

        Returns:
            (B, 3, H, W) the images as a leaf; the loss must be formed from it.
        """
        images = batch.images.detach()
        count = round(self._config.share * len(images))
        priority = torch.rand(len(images), generator=generator, device=generator.device)
        priority.index_fill_(0, batch.warped, -1.0)
        chosen = priority.topk(min(count, len(images) - len(batch.warped))).indices
        leaf = images.requires_grad_()

        def keep(gradients: Tensor) -> None:
            kept = images.detach()[chosen].float()
            # An image whose gradient overflowed keeps its place and gets no direction.
            direction = alignment_gradient(kept, gradients[chosen], fill=self._fill).nan_to_num(0, 0, 0).sign()
            self._carried[micro_step % self._slots] = Carried(kept, batch.labels[chosen], direction)

        leaf.register_hook(keep)  # type: ignore[no-untyped-call]
        return leaf

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs so that the next step is the same after a resume."""
        return {
            f"carried.{slot}.{name}": getattr(carried, name).detach().to("cpu", copy=True).contiguous()
            for slot, carried in sorted(self._carried.items())
            for name in Carried._fields
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of `state_tensors`."""
        slots = sorted({int(name.split(".")[1]) for name in tensors})
        self._carried = {
            slot: Carried(*(tensors[f"carried.{slot}.{name}"].to(device) for name in Carried._fields)) for slot in slots
        }
