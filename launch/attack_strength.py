"""How much each way of attack raises the loss of real training images, compared with exact sign ascent.

A batch gives the directions of the delayed attack and moves the weights by one plain SGD step, as in training; every
way then attacks each quarter of the batch at the moved weights. Losses are taken twice: of the mixed batch under its
own statistics, as the training step sees it, and of the warped images alone under the running averages.
"""

import copy
import logging
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aroface.alignment import frozen_statistics
from aroface.engine.seeding import derive_generator
from launch.attacked_run import WAYS, TrainedRun

__all__ = ["EXACT", "Strength", "measure_strength"]

EXACT = "adversarial (batch)"
_QUARTERS = 4
_RESAMPLES = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Strength:
    """Losses of one way, and its loss increase as a share of that of the exact attack, with a 95 % interval."""

    way: str
    loss_training: float  #: mixed batch, its own statistics
    loss_running: float  #: running averages
    kept_training: tuple[float, float, float]  #: value, low, high
    kept_running: tuple[float, float, float]


def measure_strength(run: TrainedRun, *, batches: int, batch_size: int, seed: int) -> list[Strength]:
    """Every way of `WAYS`, and the clean images first.

    Args:
        run: its weights are moved and put back.
        batches: of the training stream, augmented as in training.
        batch_size: images of a batch; a quarter of it is warped at a time.
        seed: of the images and the starts.
    """
    found: dict[str, dict[str, list[Tensor]]] = {"training": defaultdict(list), "running": defaultdict(list)}
    weights = copy.deepcopy((run.backbone.state_dict(), run.head.state_dict()))
    for number in range(batches):
        logger.info("batch %d of %d", number + 1, batches)
        images, labels = run.batch(number * batch_size, batch_size, seed=seed, augmented=True)
        signs = run.directions(images, labels)
        _step(run, images, labels)
        for quarter in torch.arange(batch_size).chunk(_QUARTERS):
            _attack_quarter(run, images, labels, signs, quarter, found, seed=seed)
        run.backbone.load_state_dict(weights[0])
        run.head.load_state_dict(weights[1])
    losses = {
        kind: {way: torch.cat(parts).double().numpy() for way, parts in ways.items()} for kind, ways in found.items()
    }
    return [_summary(way, losses) for way in ("clean", *WAYS)]


def _step(run: TrainedRun, images: Tensor, labels: Tensor) -> None:
    """One SGD step without momentum, at half the peak rate."""
    config = run.config
    parameters = [p for p in run.backbone.parameters() if p.requires_grad]
    means = [b.clone() for b in run.backbone.buffers()]
    loss = run.head(run.backbone(images), labels, step=0)
    gradients = torch.autograd.grad(loss, [*parameters, run.head.weight])
    norm = torch.stack([gradient.norm() for gradient in gradients[:-1]]).norm()
    factor = min(1.0, (config.optim.clip_norm or float("inf")) / float(norm))
    with torch.no_grad():
        for buffer, mean in zip(run.backbone.buffers(), means, strict=True):
            buffer.copy_(mean)  # the running averages of a long run hardly move in one step
        for parameter, gradient in zip(parameters, gradients[:-1], strict=True):
            parameter.sub_(gradient, alpha=config.peak_lr / 2 * factor)
        run.head.weight.sub_(gradients[-1], alpha=config.peak_lr / 2)


def _attack_quarter(
    run: TrainedRun,
    images: Tensor,
    labels: Tensor,
    signs: Tensor,
    rows: Tensor,
    found: dict[str, dict[str, list[Tensor]]],
    *,
    seed: int,
) -> None:
    for way in ("clean", *WAYS):
        generator = derive_generator(seed, "attack strength", step=int(rows[0]))
        if way == "clean":
            warped = images[rows]
        elif way == "published":  # attacks the whole batch
            warped = run.attack(images, labels, way, generator).images[rows]
        else:
            warped = run.attack(images[rows], labels[rows], way, generator, signs=signs[rows]).images
        with torch.no_grad():
            with frozen_statistics(run.backbone, "batch"):
                mixed = images.index_copy(0, rows, warped)
                found["training"][way].append(run.losses(mixed, labels)[rows])
            with frozen_statistics(run.backbone, "running"):
                found["running"][way].append(run.losses(warped, labels[rows]))


def _summary(way: str, losses: dict[str, dict[str, NDArray[np.float64]]]) -> Strength:
    kept = {kind: _kept(ways[way], ways["clean"], ways[EXACT]) for kind, ways in losses.items()}
    return Strength(
        way,
        float(losses["training"][way].mean()),
        float(losses["running"][way].mean()),
        kept["training"],
        kept["running"],
    )


def _kept(
    losses: NDArray[np.float64], clean: NDArray[np.float64], exact: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Ratio of mean increases; the interval resamples images, paired."""
    ours, reference = losses - clean, exact - clean
    draws = np.random.default_rng(0).integers(0, len(ours), (_RESAMPLES, len(ours)))
    low, high = np.quantile(ours[draws].mean(1) / reference[draws].mean(1), (0.025, 0.975))
    return float(ours.mean() / reference.mean()), float(low), float(high)
