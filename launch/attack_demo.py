"""The alignment attack on images of a trained run, outside of training."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from aroface.alignment import Alignment, find_worst, frozen_statistics, warp
from aroface.alignment.attack import random_corner
from aroface.config import TrainConfig, parse_config
from aroface.engine.checkpoint import load_head, load_weights
from aroface.engine.checkpoint_layout import read_training_state, resolve_checkpoint
from aroface.engine.seeding import derive_generator
from aroface.engine.task import contract_of
from aroface.heads import build_head
from aroface.models import build_backbone
from aroface.preprocess import normalise
from launch.training_data import open_training_data

__all__ = ["AttackDemo", "run_attack"]


@dataclass(frozen=True)
class AttackDemo:
    """Images (N, S, S, 3) uint8 RGB and losses (N,) of the three versions, and the transforms of the attack."""

    clean: NDArray[np.uint8]
    random: NDArray[np.uint8]
    attacked: NDArray[np.uint8]
    clean_loss: NDArray[np.float32]
    random_loss: NDArray[np.float32]
    attacked_loss: NDArray[np.float32]
    alignment: Alignment

    def describe(self, index: int) -> str:
        """The transform of one attacked image: scale, degrees, shift in pixels of a 112-px face."""
        degrees = math.degrees(float(self.alignment.angle_rad[index]))
        x, y = (56 * self.alignment.shift[index]).tolist()
        return f"x{float(self.alignment.scale[index]):.2f} {degrees:+.0f}° ({x:+.0f}, {y:+.0f})"


def run_attack(run: Path, *, shards: Path | None, count: int, seed: int) -> AttackDemo:
    """Load a run with its classifier and attack `count` of its training images.

    Raises:
        CheckpointError: no whole checkpoint, or class centres that do not fit the shards.
        DataError: the shards are not there.
    """
    directory = resolve_checkpoint(run)
    config = parse_config(read_training_state(directory)["config"], TrainConfig, name=f"{directory}/state.json")
    data_config = config.data if shards is None else config.data.model_copy(update={"shards": str(shards)})
    data = open_training_data(data_config, image_size=config.model.image_size)
    backbone = build_backbone(config.model)
    backbone.load_state_dict(load_weights(directory))
    head = build_head(
        config.head, num_classes=data.num_classes, embedding_dim=config.model.embedding_dim, seed=config.seed
    )
    load_head(directory, head)
    batch = next(
        iter(
            data.batches(
                seed=seed,
                start_position=0,
                num_batches=1,
                batch_size=min(count, data.num_samples),
                rank=0,
                world_size=1,
            )
        )
    )
    images = normalise(batch.images, contract_of(config)).contiguous(memory_format=torch.channels_last)

    def losses(candidates: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return head.losses(backbone(candidates), labels, step=0, update_statistics=False)

    settings = config.alignment
    with frozen_statistics(backbone, "running"):
        psi = find_worst(
            images,
            batch.labels,
            loss_of=lambda candidates, labels: losses(candidates, labels).sum(),
            config=settings,
            generator=derive_generator(seed, "attack demo"),
        )
        control = random_corner(len(images), settings, derive_generator(seed, "attack demo"))
        versions = [images, warp(images, control, fill=-1.0), warp(images, psi, fill=-1.0)]
        with torch.no_grad():
            values = [losses(version, batch.labels).numpy() for version in versions]
    pixels = [_pixels(version, is_bgr=config.data.colour_order == "bgr") for version in versions]
    return AttackDemo(pixels[0], pixels[1], pixels[2], values[0], values[1], values[2], psi)


def _pixels(images: torch.Tensor, *, is_bgr: bool) -> NDArray[np.uint8]:
    values = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return (values.flip(3) if is_bgr else values).numpy()
