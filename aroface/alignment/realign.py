"""Which images of a batch are warped, and a batch statistic that does not notice it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from aroface.alignment.attack import LossOf, find_worst, random_corner, worst_of_corners
from aroface.alignment.elastic import find_worst_elastic
from aroface.alignment.warp import Alignment, identity_alignment, warp
from aroface.config.schema import AlignmentConfig

__all__ = ["Realigned", "frozen_statistics", "realign"]


class Realigned(NamedTuple):
    """A batch with its share of warped images."""

    images: Tensor  #: (B, 3, H, W), every image once, in its place
    chosen: Tensor  #: (n,) int64 places of the warped images
    clean: Tensor  #: (n, 3, H, W) the same images before
    alignment: Alignment  #: (n,) how they were warped


def realign(
    images: Tensor,
    labels: Tensor,
    *,
    config: AlignmentConfig,
    loss_of: LossOf,
    generator: torch.Generator,
    fill: float = -1.0,
    own_rows: slice = slice(None),
) -> Realigned:
    """Draw round(share x B) images, warp only these, and put them back in place.

    Attacking the subset costs (3 + 2 k p) / 3 of a plain step, 1.17 for k = 1, p = 0.25; the published code attacks all
    images and throws three quarters of the result away, 1.67.

    Args:
        images: (B, 3, H, W) float, normalised.
        labels: (B,) class indices.
        config: kind, share and attack; `delayed` has a mix of its own, `DelayedAttack`.
        loss_of: losses for the adversary; not called where there is none.
        generator: of the draw and the start; on the device of the images.
        fill: value outside the image.
        own_rows: which of the losses belong to these images; on several ranks `loss_of` gives those of all ranks.
    """
    count = round(config.share * len(images))
    if config.kind == "none" or count == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=images.device)
        return Realigned(images, nothing, images[:0], identity_alignment(0, device=images.device))
    chosen = torch.randperm(len(images), generator=generator, device=generator.device)[:count]
    subset, field = images[chosen], None
    match config.kind:
        case "random":
            alignment = random_corner(count, config, generator)
        case "adversarial":
            alignment = find_worst(
                subset, labels[chosen], loss_of=loss_of, config=config, generator=generator, fill=fill
            )
        case "best_of":
            alignment = worst_of_corners(
                subset,
                labels[chosen],
                losses_of=lambda warped, targets: loss_of(warped, targets)[own_rows],
                config=config,
                generator=generator,
                fill=fill,
            )
        case "elastic":
            alignment, field = find_worst_elastic(
                subset, labels[chosen], loss_of=loss_of, config=config, generator=generator, fill=fill
            )
        case "delayed":
            raise ValueError("the delayed attack keeps images between steps; use DelayedAttack")
    with torch.no_grad():
        mixed = images.index_copy(0, chosen, warp(subset, alignment, fill=fill, field=field))
    return Realigned(mixed, chosen, subset, alignment)


@contextmanager
def frozen_statistics(module: nn.Module, mode: Literal["batch", "running"]) -> Iterator[None]:
    """Forward passes inside leave no trace in batch-norm statistics; dropout is off, and parameters are constants.

    Constants, because the adversary wants the gradient of the images alone: what is recorded here never forms a
    gradient of a weight.

    Args:
        module: the backbone.
        mode: `batch` normalises by the statistics of the batch at hand without recording them; `running` by the
            running averages.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m, m.training, m.track_running_stats) for m in norms]
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.training]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    buffers = [(m, m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for dropout in dropouts:
            dropout.eval()
        for norm in norms:
            if mode == "running":
                norm.eval()
            else:
                # Without running buffers a training batch norm has nothing to update.
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = None
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for dropout in dropouts:
            dropout.train()
        for norm, mean, var, count in buffers:
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count
        for norm, training, tracks in before:
            norm.train(training)
            norm.track_running_stats = tracks
