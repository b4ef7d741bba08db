"""Backbone, alignment and head as one loss: what happens to a batch between the loader and the optimiser."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from aroface.alignment import DelayedAttack, frozen_statistics, realign
from aroface.augment import augment
from aroface.config.schema import TrainConfig
from aroface.contract import InputContract
from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.engine.schedule import accumulation_steps
from aroface.engine.seeding import derive_generator
from aroface.errors import ConfigError
from aroface.heads import ShardedHead
from aroface.preprocess import normalise
from aroface.types import Batch

__all__ = ["FaceTask", "StepOutput", "contract_of"]


def contract_of(config: TrainConfig) -> InputContract:
    """The input contract of the model that a configuration trains."""
    return InputContract(image_size=config.model.image_size, colour_order=config.data.colour_order)


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gave."""

    loss: Tensor  #: scalar, mean over the global micro-batch, the same on every rank
    attack_s: float  #: host seconds spent in the alignment, 0 where it is off


class FaceTask:
    """One training step up to the loss.

    Args:
        config: the run.
        engine: the backbone.
        head: this rank's classes.
        device: of backbone and head.
        rank: of this process; its attack and augmentation draw other numbers than those of the others.

    Raises:
        ConfigError: the share of the micro-batch that the attack warps holds too few images.
    """

    def __init__(
        self, config: TrainConfig, engine: BackboneEngine, head: ShardedHead, *, device: torch.device, rank: int
    ) -> None:
        self.config, self.engine, self.head = config, engine, head
        self.contract = contract_of(config)
        self._device, self._rank = device, rank
        self._fill = (0.0 - self.contract.mean) / self.contract.std
        self._layout = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        accumulation = accumulation_steps(config, head.world_size)
        _check_share(config, config.batch.global_batch // (accumulation * head.world_size))
        self._delayed = (
            DelayedAttack(config.alignment, slots=accumulation, fill=self._fill)
            if config.alignment.kind == "delayed"
            else None
        )

    def __call__(self, batch: Batch, *, step: int, micro_step: int) -> StepOutput:
        """Loss of a micro-batch.

        Args:
            batch: images (B, H, W, 3) uint8 and labels.
            step: optimiser step; selects the head's negatives.
            micro_step: counts micro-batches over the whole run; selects what augmentation and attack draw.
        """
        images = normalise(batch.images.to(self._device, non_blocking=True), self.contract)
        labels = batch.labels.to(self._device, non_blocking=True)
        images = augment(images, self.config.data.augment, self._generator("augment", micro_step))
        started = time.perf_counter()
        images, labels = self._align(images, labels, step=step, micro_step=micro_step)
        attack_s = time.perf_counter() - started
        return StepOutput(self.head(self.engine(images), labels, step=step), attack_s)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the next step needs beyond weights and position, on the CPU; empty but for the delayed attack."""
        return self._delayed.state_tensors() if self._delayed else {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        if self._delayed and tensors:
            self._delayed.load_state_tensors(tensors, self._device)

    def _align(self, images: Tensor, labels: Tensor, *, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """The images and labels to train on, in the layout of the backbone."""
        config = self.config.alignment
        generator = self._generator("alignment", micro_step)
        if self._delayed:
            mixed = self._delayed.mix(images, labels, micro_step=micro_step, generator=generator)
            mixed = mixed._replace(images=mixed.images.contiguous(memory_format=self._layout))
            return self._delayed.watch(mixed, micro_step=micro_step, generator=generator), mixed.labels
        if config.kind != "none":
            first = self._rank * round(config.share * len(images))
            with frozen_statistics(self.engine.module, config.batch_statistics):
                images = realign(
                    images,
                    labels,
                    config=config,
                    loss_of=lambda warped, targets: self._adversary_losses(warped, targets, step),
                    generator=generator,
                    fill=self._fill,
                    own_rows=slice(first, first + round(config.share * len(images))),
                ).images
        return images.contiguous(memory_format=self._layout), labels

    def _adversary_losses(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """(N,) of the images of all ranks, in rank order."""
        with self._autocast():
            embeddings = self.engine.module(images.contiguous(memory_format=self._layout))
        return self.head.losses(embeddings, labels, step=step, update_statistics=False)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.config.engine.precision == "bf16")

    def _generator(self, purpose: str, micro_step: int) -> torch.Generator:
        return derive_generator(self.config.seed, purpose, step=micro_step, rank=self._rank, device=self._device)


def _check_share(config: TrainConfig, micro_batch: int) -> None:
    alignment = config.alignment
    if alignment.kind == "none":
        return
    count = round(alignment.share * micro_batch)
    if count == 0:
        raise ConfigError(
            f"alignment.share = {alignment.share} of {micro_batch} images per rank and micro-batch is no image; raise "
            "alignment.share or batch.micro_batch, or set alignment.kind: none."
        )
    is_normalised_alone = alignment.kind in ("adversarial", "best_of") and alignment.batch_statistics == "batch"
    if count == 1 and is_normalised_alone:
        raise ConfigError(
            f"alignment.share = {alignment.share} of {micro_batch} images per rank and micro-batch is one image, which "
            "has no batch statistics; raise alignment.share or batch.micro_batch, or set "
            "alignment.batch_statistics: running."
        )
