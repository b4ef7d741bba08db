"""Backbone, alignment and head as one loss: what happens to a batch between the loader and the optimiser."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from aroface.alignment import frozen_statistics, realign
from aroface.augment import augment
from aroface.config.schema import TrainConfig
from aroface.contract import InputContract
from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.engine.seeding import derive_generator, derive_seed
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
    """

    def __init__(
        self, config: TrainConfig, engine: BackboneEngine, head: ShardedHead, *, device: torch.device, rank: int
    ) -> None:
        self.config, self.engine, self.head = config, engine, head
        self.contract = contract_of(config)
        self._device, self._rank = device, rank
        self._draws_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in engine.module.modules())

    def __call__(self, batch: Batch, *, step: int, micro_step: int) -> StepOutput:
        """Loss of a micro-batch.

        Args:
            batch: images (B, H, W, 3) uint8 and labels.
            step: optimiser step; selects the head's negatives.
            micro_step: counts micro-batches over the whole run; selects what augmentation and attack draw.
        """
        config = self.config
        if self._draws_dropout:  # it draws from torch's global generator, which no checkpoint holds
            torch.manual_seed(derive_seed(config.seed, "dropout", step=micro_step, rank=self._rank))
        images = normalise(batch.images.to(self._device, non_blocking=True), self.contract)
        labels = batch.labels.to(self._device, non_blocking=True)
        images = augment(images, config.data.augment, self._generator("augment", micro_step))
        started = time.perf_counter()
        if config.alignment.kind != "none":
            with frozen_statistics(self.engine.module, config.alignment.batch_statistics):
                images = realign(
                    images,
                    labels,
                    config=config.alignment,
                    loss_of=lambda warped, targets: self._adversary_loss(warped, targets, step),
                    generator=self._generator("alignment", micro_step),
                    fill=(0.0 - self.contract.mean) / self.contract.std,
                ).images
        attack_s = time.perf_counter() - started
        layout = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        embeddings = self.engine(images.contiguous(memory_format=layout))
        return StepOutput(self.head(embeddings, labels, step=step), attack_s)

    def _adversary_loss(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        layout = torch.channels_last if self.config.engine.channels_last else torch.contiguous_format
        with self._autocast():
            embeddings = self.engine.module(images.contiguous(memory_format=layout))
        loss: Tensor = self.head(embeddings, labels, step=step, update_statistics=False)
        return loss

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.config.engine.precision == "bf16")

    def _generator(self, purpose: str, micro_step: int) -> torch.Generator:
        return derive_generator(self.config.seed, purpose, step=micro_step, rank=self._rank, device=self._device)
