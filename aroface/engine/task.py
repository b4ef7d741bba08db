"""Backbone, alignment and head as one loss: what happens to a batch between the loader and the optimiser."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aroface.alignment import (
    DelayedAttack,
    draw_release,
    frozen_statistics,
    realign,
    release_mix,
)
from aroface.alignment.delayed import Mixed
from aroface.augment import augment
from aroface.config.schema import TrainConfig
from aroface.contract import InputContract
from aroface.distributed import all_reduce
from aroface.engine.compiled import untouched
from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.engine.schedule import accumulation_steps, check_share
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
        self._nothing = torch.empty(0, dtype=torch.int64, device=device)
        accumulation = accumulation_steps(config, head.world_size)
        check_share(config, head.world_size)
        self._delayed = (
            DelayedAttack(config.alignment, slots=accumulation, fill=self._fill)
            if config.alignment.kind == "delayed"
            else None
        )
        self._draws_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in engine.module.modules())

    def __call__(self, batch: Batch, *, step: int, micro_step: int) -> StepOutput:
        """Loss of a micro-batch.

        Args:
            batch: images (B, H, W, 3) uint8 and labels.
            step: optimiser step; selects the head's negatives.
            micro_step: counts micro-batches over the whole run; selects what augmentation and attack draw.
        """
        return self._output(batch, step=step, micro_step=micro_step, main_pass=self.engine)

    def rehearse(self, micro_batch: int, steps: range) -> None:
        """Every pass of a step, forward and backward, that changes nothing: what is compiled or recorded sees it first.

        Args:
            micro_batch: images of this rank, here of noise.
            steps: optimiser steps that follow; one of each kind of attack pass is rehearsed.
        """
        side, numbers = self.config.model.image_size, torch.arange(micro_batch)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (micro_batch, side, side, 3), dtype=torch.uint8, generator=generator)
        batch = Batch(images, numbers % self.head.num_classes, numbers)
        trained = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        kinds = {self.config.alignment.statistics_at(step): step for step in (steps[0], steps[-1])}
        with untouched(self.engine.module, self.head):
            for step in kinds.values():
                # Not through DeepSpeed, whose hooks would take it for the beginning of a step.
                output = self._output(batch, step=step, micro_step=0, main_pass=self._main_pass)
                torch.autograd.grad(output.loss, trained)

    def _output(self, batch: Batch, *, step: int, micro_step: int, main_pass: Callable[[Tensor], Tensor]) -> StepOutput:
        if self._draws_dropout:  # it draws from torch's global generator, which no checkpoint holds
            torch.manual_seed(derive_seed(self.config.seed, "dropout", step=micro_step, rank=self._rank))
        images = normalise(batch.images.to(self._device, non_blocking=True), self.contract)
        labels = batch.labels.to(self._device, non_blocking=True)
        images = augment(images, self.config.data.augment, self._generator("augment", micro_step))
        started = time.perf_counter()
        aligned = self._align(images, labels, step=step, micro_step=micro_step)
        has_consistency = self.config.alignment.consistency_weight > 0 and len(aligned.warped) > 0
        target = self._clean_embeddings(aligned.clean, step) if has_consistency else None
        attack_s = time.perf_counter() - started
        embeddings = main_pass(aligned.images)
        loss = self.head(embeddings, aligned.labels, step=step)
        if target is not None:
            loss = loss + self._inconsistency(embeddings[aligned.warped], target)
        return StepOutput(loss, attack_s)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the next step needs beyond weights and position, on the CPU; empty but for the delayed attack."""
        return self._delayed.state_tensors() if self._delayed else {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        if self._delayed and tensors:
            self._delayed.load_state_tensors(tensors, self._device)

    def _align(self, images: Tensor, labels: Tensor, *, step: int, micro_step: int) -> Mixed:
        """The images and labels to train on, in the layout of the backbone."""
        config = self.config.alignment
        generator = self._generator("alignment", micro_step)
        if self._delayed:
            mixed = self._delayed.mix(images, labels, micro_step=micro_step, generator=generator)
            mixed = mixed._replace(images=mixed.images.contiguous(memory_format=self._layout))
            leaf = self._delayed.watch(mixed, micro_step=micro_step, generator=generator)
            return mixed._replace(images=leaf)
        if config.release_compat:
            mixed = self._release_mix(images, labels, step=step, micro_step=micro_step)
        elif config.kind == "none":
            mixed = Mixed(images, labels, self._nothing, images[:0])
        else:
            count = round(config.share * len(images))
            with frozen_statistics(self.engine.module, config.statistics_at(step)):
                realigned = realign(
                    images,
                    labels,
                    config=config,
                    loss_of=lambda warped, targets: self._adversary_losses(warped, targets, step),
                    generator=generator,
                    fill=self._fill,
                    own_rows=slice(self._rank * count, (self._rank + 1) * count),
                )
            mixed = Mixed(realigned.images, labels, realigned.chosen, realigned.clean)
        return mixed._replace(images=mixed.images.contiguous(memory_format=self._layout))

    def _release_mix(self, images: Tensor, labels: Tensor, *, step: int, micro_step: int) -> Mixed:
        """As the published code: training mode, other negatives than the main pass, the same draws on every rank."""
        generator = derive_generator(self.config.seed, "alignment", step=micro_step, device=self._device)
        images, labels = release_mix(
            images,
            labels,
            loss_of=lambda warped, targets: self._adversary_losses(warped, targets, -1 - step),
            config=self.config.alignment,
            draws=draw_release(len(images), self.config.alignment, generator),
        )
        return Mixed(images, labels, self._nothing, images[:0])

    def _clean_embeddings(self, images: Tensor, step: int) -> Tensor:
        with torch.no_grad(), frozen_statistics(self.engine.module, self.config.alignment.statistics_at(step)):
            return self._embed(images).float()

    def _inconsistency(self, warped: Tensor, clean: Tensor) -> Tensor:
        """Weight x (1 - cosine), a mean over the warped images of all ranks with the gradient of this rank's."""
        own = (1 - functional.cosine_similarity(warped.float(), clean)).mean()
        mean = all_reduce(own.detach().clone()) / self.head.world_size
        return self.config.alignment.consistency_weight * (own + (mean - own.detach()))

    def _adversary_losses(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """(N,) of the images of all ranks, in rank order."""
        losses = self.head.losses(self._embed(images), labels, step=step, update_statistics=False)
        return losses * self.engine.scaler.scale  # so that an fp16 gradient does not vanish; only its sign is used

    def _embed(self, images: Tensor) -> Tensor:
        """Of the adversary and of clean images; no gradient of a weight follows."""
        return self.engine.beside(images.contiguous(memory_format=self._layout))

    def _main_pass(self, images: Tensor) -> Tensor:
        """The engine's, without the engine."""
        with self.engine.autocast():
            embeddings: Tensor = self.engine.module(images)
        return embeddings

    def _generator(self, purpose: str, micro_step: int) -> torch.Generator:
        return derive_generator(self.config.seed, purpose, step=micro_step, rank=self._rank, device=self._device)
