"""Which precision `engine.precision: auto` stands for."""

import torch

from aroface.bf16 import has_bf16_units, warn_without_bf16_units
from aroface.config.schema import TrainConfig
from aroface.distributed import any_rank

__all__ = ["with_precision"]


def with_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration with the precision that it trains in: bf16 where all ranks have units for it, else fp32.

    A collective. A warning goes out where bf16 is asked for and this rank has none.
    """
    if config.engine.precision == "bf16":
        instead = "Set engine.precision: auto or fp32."
        warn_without_bf16_units("engine.precision: bf16", device.type, instead=instead)
    if config.engine.precision != "auto":
        return config
    precision = "fp32" if any_rank(not has_bf16_units(device.type)) else "bf16"
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": precision})})
