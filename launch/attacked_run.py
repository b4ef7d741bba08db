"""A trained run with its classifier, and what each attack makes of images of its training set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aroface.alignment import Attacked, alignment_gradient, attack_images, draw_release, frozen_statistics, warp
from aroface.alignment.attack import start_alignment, step_along
from aroface.alignment.elastic import random_elastic
from aroface.alignment.release import release_attack, release_warp
from aroface.augment import augment
from aroface.config import TrainConfig, parse_config
from aroface.config.alignment import STEPS_TO_SETTLE, AlignmentConfig
from aroface.engine.checkpoint import load_backbone, load_head
from aroface.engine.checkpoint_layout import read_training_state, resolve_checkpoint
from aroface.engine.seeding import derive_generator
from aroface.engine.task import contract_of
from aroface.heads import ShardedHead, build_head
from aroface.models import build_backbone
from aroface.preprocess import normalise
from aroface.types import TrainingData
from launch.training_data import open_training_data

__all__ = ["WAYS", "TrainedRun", "attack_config", "open_run"]

#: name -> settings of the section `alignment`; `random elastic` is the control of `elastic`, no kind of training.
WAYS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "adversarial": {"kind": "adversarial"},
    "adversarial (batch)": {"kind": "adversarial", "batch_statistics": "batch"},
    "delayed": {"kind": "delayed"},
    "best_of 2": {"kind": "best_of", "candidates": 2},
    "best_of 4": {"kind": "best_of", "candidates": 4},
    "best_of 16": {"kind": "best_of", "candidates": 16},
    "random elastic": {"kind": "elastic"},
    "elastic": {"kind": "elastic"},
    "published": {"kind": "adversarial", "release_compat": True},
}
_FILL = -1.0


def attack_config(base: AlignmentConfig, way: str) -> AlignmentConfig:
    """The settings of a run with another way of attack; one step, because `delayed` has one."""
    kept = base.model_dump(mode="json", exclude={"kind", "batch_statistics", "candidates", "release_compat"})
    kept["share"] = 0.25
    changed = {**kept, "steps": 1, "consistency_weight": 0.0, **WAYS[way]}
    if "release_compat" in WAYS[way]:
        changed["landmark_budget_px"] = None
    return parse_config(changed, AlignmentConfig, name=f"the settings of {way!r}")


@dataclass(frozen=True)
class TrainedRun:
    """Backbone in training mode, head and data of a checkpoint."""

    config: TrainConfig
    backbone: torch.nn.Module
    head: ShardedHead
    data: TrainingData

    def batch(self, position: int, size: int, *, seed: int, augmented: bool = False) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, S, S), channels last, and labels from a position of the stream."""
        stream = self.data.batches(
            seed=seed, start_position=position, num_batches=1, batch_size=size, rank=0, world_size=1
        )
        batch = next(iter(stream))
        images = normalise(batch.images, contract_of(self.config))
        if augmented:
            generator = derive_generator(seed, "attack augment", step=position)
            images = augment(images, self.config.data.augment, generator)
        return images.contiguous(memory_format=torch.channels_last), batch.labels

    def losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B,) under the statistics that the backbone is set to."""
        embeddings = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return self.head.losses(embeddings, labels, step=0, update_statistics=False)

    def attack(
        self, images: Tensor, labels: Tensor, way: str, generator: torch.Generator, *, signs: Tensor | None = None
    ) -> Attacked:
        """Warp all images in one of `WAYS`.

        Args:
            images: (n, 3, S, S).
            labels: (n,).
            way: key of `WAYS`.
            generator: of the start.
            signs: (n, 4) of `directions` for `delayed`; None: taken now, at these weights.
        """
        config = attack_config(self.config.alignment, way)
        if way == "delayed":
            directions = self.directions(images, labels) if signs is None else signs
            psi = step_along(start_alignment(len(images), config, generator), directions, config)
            return Attacked(warp(images, psi, fill=_FILL), psi, None)
        if way == "random elastic":
            psi, field = random_elastic(len(images), (images.shape[2], images.shape[3]), config, generator)
            return Attacked(warp(images, psi, fill=_FILL, field=field), psi, field)
        with frozen_statistics(self.backbone, config.statistics_at(STEPS_TO_SETTLE)):
            if config.release_compat:
                draws = draw_release(len(images), config, generator)
                psi = release_attack(images, labels, loss_of=self.losses, config=config, draws=draws)
                return Attacked(release_warp(images, psi), psi, None)
            return attack_images(images, labels, config=config, loss_of=self.losses, generator=generator, fill=_FILL)

    def directions(self, images: Tensor, labels: Tensor) -> Tensor:
        """(n, 4) signs of d loss / d psi at the identity, as the main pass of a step gives them."""
        leaf = images.detach().clone().requires_grad_()
        with frozen_statistics(self.backbone, "batch"):
            (gradients,) = torch.autograd.grad(self.losses(leaf, labels).mean(), leaf)
        return alignment_gradient(images, gradients, fill=_FILL).sign()


def open_run(run: Path, *, shards: Path | None) -> TrainedRun:
    """Load a run with its classifier and its training images.

    Raises:
        CheckpointError: no whole checkpoint, or class centres that do not fit the shards.
        DataError: the shards are not there.
    """
    directory = resolve_checkpoint(run)
    config = parse_config(read_training_state(directory)["config"], TrainConfig, name=f"{directory}/state.json")
    data_config = config.data if shards is None else config.data.model_copy(update={"shards": str(shards)})
    data = open_training_data(data_config, image_size=config.model.image_size)
    backbone = build_backbone(config.model)
    load_backbone(directory, backbone)
    head = build_head(
        config.head, num_classes=data.num_classes, embedding_dim=config.model.embedding_dim, seed=config.seed
    )
    load_head(directory, head)
    return TrainedRun(config, backbone.train(), head, data)
