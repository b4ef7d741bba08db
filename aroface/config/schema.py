"""Every setting of a training run: meaning, unit, range. Frozen, unknown keys refused, no torch.

Fields that change the result have no default in a published configuration; the defaults here are those of the paper's
release or of the field, and each names its effect. Sections that a run does not use are still checked. The sections
with choices lie in files of their own: `model`, `head`, `alignment`, `data`.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from aroface.config.alignment import AlignmentConfig
from aroface.config.data import AugmentConfig, DataConfig
from aroface.config.engine import CheckpointConfig, EngineConfig, LossScaleConfig
from aroface.config.evaluate import EvaluateConfig
from aroface.config.head import (
    AdaFaceConfig,
    ArcFaceConfig,
    CombinedMarginConfig,
    CosFaceConfig,
    CurricularFaceConfig,
    HeadConfig,
    MagFaceConfig,
)
from aroface.config.model import IRConfig, IResNetConfig, MobileFaceNetConfig, ModelConfig, ViTConfig
from aroface.config.section import Section

__all__ = [
    "AdaFaceConfig",
    "AlignmentConfig",
    "ArcFaceConfig",
    "AugmentConfig",
    "BatchConfig",
    "CheckpointConfig",
    "CombinedMarginConfig",
    "CosFaceConfig",
    "CurricularFaceConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "HeadConfig",
    "IRConfig",
    "IResNetConfig",
    "LogConfig",
    "LossScaleConfig",
    "MagFaceConfig",
    "MobileFaceNetConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ViTConfig",
]


class BatchConfig(Section):
    """global = micro x accumulation x ranks; the accumulation is derived."""

    global_batch: int = Field(ge=1, description="images per optimiser step over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="images per forward pass and rank; null: global / ranks")


class OptimConfig(Section):
    """SGD with momentum, for the backbone and for the class centres."""

    kind: Literal["sgd"] = "sgd"
    lr_per_1024: float = Field(0.1, gt=0, description="peak learning rate = this x global_batch / 1024")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    clip_norm: float | None = Field(5.0, gt=0, description="largest gradient norm; null: no clipping")
    clip_scope: Literal["backbone", "joint"] = Field(
        "backbone",
        description="backbone: its norm, and it alone is clipped, as in arcface_torch; joint: the norm over backbone "
        "and class centres, both scaled alike",
    )


class ScheduleConfig(Section):
    """Linear warm-up, then polynomial decay to zero, stepped once per optimiser step."""

    epochs: float = Field(gt=0, description="passes over the training set")
    warmup_epochs: float = Field(0.0, ge=0)
    power: float = Field(2.0, gt=0, description="exponent of the decay; arcface_torch trains with 1")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.warmup_epochs} leaves nothing of schedule.epochs = {self.epochs}; "
                "lower warmup_epochs"
            )
        return self


class LogConfig(Section):
    """metrics.jsonl and TensorBoard."""

    every_steps: int = Field(10, ge=1, description="steps between log lines; each costs one host synchronisation")
    tensorboard: bool = Field(True)


class TrainConfig(Section):
    """One training run, complete."""

    seed: int = Field(ge=0, lt=2**31, description="of the weights, the data order, the attack and the augmentation")
    model: ModelConfig
    head: HeadConfig
    alignment: AlignmentConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluate: EvaluateConfig | None = Field(None, description="evaluation while training; null: none")

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: proportional to the global batch."""
        return self.optim.lr_per_1024 * self.batch.global_batch / 1024
