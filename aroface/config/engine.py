"""Settings of the engine and of its checkpoints: memory, speed, rounding, and what is kept."""

from typing import Any, Literal

from pydantic import Field

from aroface.config.section import Section

__all__ = ["CheckpointConfig", "EngineConfig", "LossScaleConfig"]


class LossScaleConfig(Section):
    """fp16 only: the factor on the loss that keeps small gradients from vanishing."""

    initial: float = Field(65536.0, ge=1, description="factor at the first step")
    window: int = Field(1000, ge=1, description="steps without overflow after which the factor doubles")
    minimum: float = Field(1.0, gt=0, description="training stops where an overflow would take the factor below this")


class EngineConfig(Section):
    """DeepSpeed, as far as it changes memory, speed or rounding."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed partitions over ranks; 1: optimiser state")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="bf16, fp16: autocast, with fp32 weights, norms and loss; fp16 scales the loss; auto: bf16 where "
        "the device has units for it, else fp32",
    )
    loss_scale: LossScaleConfig = LossScaleConfig()
    batch_norm: Literal["local", "sync", "frozen"] = Field(
        "local",
        description="local: statistics of each rank's images, running ones averaged at saves; sync: of all ranks' "
        "images (GPU only); frozen: running statistics as they were loaded, not updated",
    )
    channels_last: bool = Field(True, description="memory layout of images and activations; speed only")
    compile: bool = Field(
        False,
        description="torch.compile for the backbone: minutes before the first step, then faster steps; eager with a "
        "warning where the compiler fails",
    )
    fused_norms: bool = Field(
        True,
        description="batch norms fused with PReLU or residual in Triton, on GPUs; false: PyTorch's own",
    )
    cuda_graphs: bool = Field(
        False,
        description="replay the passes through the backbone from CUDA graphs, on GPUs: one launch instead of thousands",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; null: idle cores / ranks of the machine")
    timeout_s: float = Field(
        1800.0, gt=0, description="seconds that a rank waits for the others, or makes no step, before the job ends"
    )
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict, description="further DeepSpeed settings, checked by name"
    )

    @property
    def decided_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """`precision`, after `aroface.engine.precision.with_precision` has put one in the place of auto."""
        if self.precision == "auto":
            raise ValueError("engine.precision is still auto; the trainer decides it by the device")
        return self.precision


class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    every_steps: int | None = Field(None, ge=1, description="null: once per epoch")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None, ge=1, description="checkpoints of steps divisible by this are kept for ever; null: none"
    )
    background: bool = Field(
        True, description="write while training goes on, from a copy in memory; false: training waits for the disk"
    )
