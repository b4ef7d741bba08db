"""Steps and learning rates as pure functions."""

import math

from aroface.config.schema import TrainConfig
from aroface.errors import ConfigError

__all__ = ["accumulation_steps", "learning_rate", "total_steps"]


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


def learning_rate(config: TrainConfig, step: int, *, num_samples: int) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up to the peak, then polynomial decay to zero."""
    schedule = config.schedule
    total = total_steps(config, num_samples)
    warmup = round(schedule.warmup_epochs * num_samples / config.batch.global_batch)
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    return config.peak_lr * float((1 - (step - warmup) / max(1, total - warmup)) ** schedule.power)
