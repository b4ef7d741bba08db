"""The alignment attack on images of a trained run, outside of training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from aroface.alignment import Alignment, frozen_statistics
from aroface.engine.seeding import derive_generator
from launch.attacked_run import TrainedRun, open_run

__all__ = ["AttackDemo", "Version", "run_attack"]


@dataclass(frozen=True)
class Version:
    """The images after one way of attack."""

    way: str  #: `clean`, or a key of `launch.attacked_run.WAYS`
    pixels: NDArray[np.uint8]  #: (N, S, S, 3) RGB
    losses: NDArray[np.float32]  #: (N,) under the running averages
    alignment: Alignment | None  #: None where clean
    field_px: NDArray[np.float32] | None  #: (N,) farthest local displacement, pixels of a 112-px face

    def describe(self, index: int) -> str:
        """Loss and transform of one image: scale, degrees, shift in pixels of a 112-px face."""
        text = f"loss {self.losses[index]:.1f}"
        if self.alignment is None:
            return text
        degrees = math.degrees(float(self.alignment.angle_rad[index]))
        x, y = (56 * self.alignment.shift[index]).tolist()
        text += f"\nx{float(self.alignment.scale[index]):.2f} {degrees:+.0f}° ({x:+.0f}, {y:+.0f})"
        return text if self.field_px is None else f"{text}\nlocal {self.field_px[index]:.1f} px"


@dataclass(frozen=True)
class AttackDemo:
    """The same images in several versions, the clean one first."""

    versions: tuple[Version, ...]


def run_attack(run: Path, *, shards: Path | None, ways: Sequence[str], count: int, seed: int) -> AttackDemo:
    """Load a run with its classifier and attack `count` of its training images.

    Args:
        run: run directory or checkpoint.
        shards: training shards; None: those of the run.
        ways: keys of `launch.attacked_run.WAYS`.
        count: images, at most those there are.
        seed: of the choice of images and of the starts.

    Raises:
        CheckpointError: no whole checkpoint, or class centres that do not fit the shards.
        DataError: the shards are not there.
    """
    trained = open_run(run, shards=shards)
    images, labels = trained.batch(0, min(count, trained.data.num_samples), seed=seed)
    versions = [_version(trained, "clean", images, labels, None, None)]
    for way in ways:
        attacked = trained.attack(images, labels, way, derive_generator(seed, "attack demo"))
        versions.append(_version(trained, way, attacked.images, labels, attacked.alignment, attacked.field))
    return AttackDemo(tuple(versions))


def _version(
    run: TrainedRun,
    way: str,
    images: torch.Tensor,
    labels: torch.Tensor,
    psi: Alignment | None,
    field: torch.Tensor | None,
) -> Version:
    with torch.no_grad(), frozen_statistics(run.backbone, "running"):
        losses = run.losses(images, labels).numpy()
    pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if run.config.data.colour_order == "bgr":
        pixels = pixels.flip(3)
    farthest = None if field is None else (56 * field.norm(dim=3)).amax((1, 2)).numpy()
    return Version(way, pixels.numpy(), losses, psi, farthest)
