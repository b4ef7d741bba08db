"""Steps and learning rates as pure functions."""

import math

from aroface.config.alignment import release_counts
from aroface.config.schema import TrainConfig
from aroface.errors import ConfigError

__all__ = ["accumulation_steps", "check_share", "learning_rate", "total_steps"]


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimiser steps of a run: whole epochs are finished, the last batch runs into the next epoch."""
    return max(1, math.ceil(config.schedule.epochs * num_samples / config.batch.global_batch))


def accumulation_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimiser step.

    Raises:
        ConfigError: micro x accumulation x ranks = global has no whole solution; all four numbers are named.
    """
    batch = config.batch
    micro = batch.micro_batch if batch.micro_batch is not None else batch.global_batch // world_size
    if micro == 0 or batch.global_batch % (micro * world_size):
        exact = batch.global_batch / (max(micro, 1) * world_size)
        raise ConfigError(
            f"Batch sizes disagree: batch.micro_batch {micro} x accumulation {exact:.4g} x {world_size} ranks = "
            f"batch.global_batch {batch.global_batch} needs a whole accumulation. Change batch.micro_batch or "
            "batch.global_batch."
        )
    return batch.global_batch // (micro * world_size)


def check_share(config: TrainConfig, world_size: int) -> None:
    """Refuse an attack whose share of a micro-batch cannot be had.

    Raises:
        ConfigError: it is no image, or one where statistics of the batch are wanted; or batch sizes that disagree.
    """
    micro_batch = config.batch.global_batch // (accumulation_steps(config, world_size) * world_size)
    alignment = config.alignment
    if alignment.kind == "none":
        return
    count = round(alignment.share * micro_batch)
    if count == 0:
        raise ConfigError(
            f"alignment.share = {alignment.share} of {micro_batch} images per rank and micro-batch is no image; raise "
            "alignment.share or batch.micro_batch, or set alignment.kind: none."
        )
    clean, warped = release_counts(micro_batch, alignment.share)
    if alignment.release_compat and clean + warped != micro_batch:
        raise ConfigError(
            f"alignment.release_compat with alignment.share = {alignment.share} makes {clean} + {warped} of "
            f"{micro_batch} images, where the published code stops as well; use a multiple of 1/8 and a "
            "batch that 8 divides (0.25: 4, 0.5: 2), or release_compat: false."
        )
    has_pass = alignment.kind in ("adversarial", "best_of", "elastic") or alignment.consistency_weight > 0
    if count == 1 and has_pass and alignment.batch_statistics != "running":
        raise ConfigError(
            f"alignment.share = {alignment.share} of {micro_batch} images per rank and micro-batch is one image, which "
            "has no batch statistics; raise alignment.share or batch.micro_batch, or set "
            "alignment.batch_statistics: running."
        )


def learning_rate(config: TrainConfig, step: int, *, num_samples: int) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up to the peak, then polynomial decay to zero."""
    schedule = config.schedule
    total = total_steps(config, num_samples)
    warmup = round(schedule.warmup_epochs * num_samples / config.batch.global_batch)
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    return config.peak_lr * float((1 - (step - warmup) / max(1, total - warmup)) ** schedule.power)
