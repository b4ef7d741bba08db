"""Every setting of a training run: meaning, unit, range. Frozen, unknown keys refused, no torch.

Fields that change the result have no default in a published configuration; the defaults here are those of the paper's
release or of the field, and each names its effect. Sections that a run does not use are still checked.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aroface.contract import ColourOrder

__all__ = [
    "AdaFaceConfig",
    "AlignmentConfig",
    "ArcFaceConfig",
    "AugmentConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "HeadConfig",
    "IResNetConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class IResNetConfig(_Section):
    """The improved residual network of ArcFace."""

    kind: Literal["iresnet"]
    depth: Literal[18, 34, 50, 100, 200] = Field(description="network depth; 100 is R100")
    embedding_dim: int = Field(512, ge=8, le=4096, description="length of the embedding")
    image_size: int = Field(112, ge=16, le=448, description="side of the input, pixels; faces are resized to it")
    width: float = Field(
        1.0, gt=0, le=4, description="factor on the channels of every stage; 1 is the published network"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability in front of the last linear layer")
    checkpoint_activations: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, 1/3 more work"
    )


ModelConfig = IResNetConfig


class _SoftmaxHead(_Section):
    logit_scale: float = Field(64.0, gt=0, description="s: factor on the cosines before the softmax")
    margin: float = Field(description="m, radians (ArcFace) or the base margin (AdaFace)", ge=0, le=1.57)
    margin_gradient: Literal["exact", "straight_through"] = Field(
        "exact", description="differentiate the margin, or take d target / d cos = 1 as arcface_torch does"
    )
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the classes in each step's softmax (Partial FC)")
    chunk_classes: int = Field(8192, ge=1, description="classes whose logits exist at one time; memory, not the result")


class ArcFaceConfig(_SoftmaxHead):
    """Additive angular margin, arXiv:1801.07698."""

    kind: Literal["arcface"]


class AdaFaceConfig(_SoftmaxHead):
    """Margin adapted to the feature norm, arXiv:2204.00964."""

    kind: Literal["adaface"]
    h: float = Field(0.333, gt=0, le=1, description="concentration: norms within mean +- std/h map to [-1, 1]")
    statistics_momentum: float = Field(
        0.01, gt=0, le=1, description="weight of a new batch in the running mean and std of the norms (t_alpha)"
    )


HeadConfig = Annotated[ArcFaceConfig | AdaFaceConfig, Field(discriminator="kind")]


class AlignmentConfig(_Section):
    """Which images are re-aligned in each step, how, and how far."""

    kind: Literal["none", "random", "adversarial"]
    share: float = Field(0.25, ge=0, le=1, description="p: share of each micro-batch that is warped")
    steps: int = Field(1, ge=1, le=50, description="k: sign-ascent steps; ignored unless adversarial")
    start_noise: float = Field(
        0.01, ge=0, description="standard deviation of the start around the identity, all parameters"
    )
    scale_step: float = Field(0.1, ge=0, le=1, description="eta of the warp scale")
    angle_step_rad: float = Field(0.1, ge=0, le=1, description="eta of the angle, radians")
    shift_step: float = Field(0.1, ge=0, le=1, description="eta of the shift, half images")
    scale_box: float = Field(0.2, gt=0, lt=1, description="the warp scale stays within 1 +- this")
    angle_box_rad: float = Field(0.2, gt=0, le=3.15, description="the angle stays within +- this, radians")
    shift_box: float = Field(0.2, gt=0, le=1, description="each shift stays within +- this, half images")
    landmark_budget_px: float | None = Field(
        None,
        gt=0,
        description="farthest any of the five template landmarks may move, pixels of a 112-px face; null: no limit",
    )
    batch_statistics: Literal["batch", "running"] = Field(
        "batch", description="BatchNorm in the attack pass: of the attacked images, or the running averages"
    )


class AugmentConfig(_Section):
    """Random changes on the device, each with its probability per image; 0 switches it off."""

    flip: float = Field(0.5, ge=0, le=1, description="mirror left-right")
    low_resolution: float = Field(0.0, ge=0, le=1, description="shrink to 20-100 % of the side and back")
    photometric: float = Field(0.0, ge=0, le=1, description="brightness, contrast and saturation")
    crop: float = Field(0.0, ge=0, le=1, description="keep a random 20-100 % of the area at its place, black elsewhere")
    erase: float = Field(0.0, ge=0, le=1, description="black rectangle of 2-25 % of the area")
    grey: float = Field(0.0, ge=0, le=1, description="drop the colour")


class RandomOrder(_Section):
    """Every sample once per epoch, in any order: for memory and local disks."""

    kind: Literal["random"] = "random"


class BlockOrder(_Section):
    """Every sample once per epoch, read in blocks of neighbours: for network mounts, spinning disks, remote shards."""

    kind: Literal["block"] = "block"
    block_samples: int = Field(1024, ge=1, description="consecutive samples of a block; one sequential read")
    window_blocks: int = Field(16, ge=1, description="blocks whose samples are shuffled together")


class BalancedOrder(_Section):
    """Every identity equally often, its images in turn."""

    kind: Literal["balanced"] = "balanced"


class WeightedOrder(_Section):
    """Identities drawn by weight, with replacement."""

    kind: Literal["weighted"] = "weighted"
    power: float = Field(0.5, ge=0, le=2, description="weight = images of the identity ** power; 1 natural, 0 even")
    weights: str | None = Field(None, description="CSV of identity,weight in place of the power; others have 1")


OrderConfig = Annotated[RandomOrder | BlockOrder | BalancedOrder | WeightedOrder, Field(discriminator="kind")]


class ShardMix(_Section):
    """One of several shard sets that are trained on together; its classes are its own."""

    shards: str = Field(description="directory or URL")
    ratio: float = Field(gt=0, description="share of the stream, relative to the other sets")


class DataConfig(_Section):
    """The training shards."""

    shards: str | list[ShardMix] = Field(
        description="directory written by `aroface pack`, its http(s)://, s3:// or pipe: address, or a list of "
        "{shards, ratio}"
    )
    order: OrderConfig | None = Field(None, description="null: random on local disks, block for remote shards")
    cache: str | None = Field(
        None, description="folder for copies of remote shards; null: stream them, order not exact"
    )
    cache_gib: float | None = Field(None, gt=0, description="largest size of the cache; null: no limit")
    colour_order: ColourOrder = Field(description="channel order that the model is trained with")
    workers: int = Field(1, ge=1, le=64, description="decoding threads per rank")
    max_bad_samples: int = Field(0, ge=0, description="unreadable samples tolerated per run before it stops")
    min_images_per_identity: int = Field(1, ge=1, description="identities with fewer images are left out")
    augment: AugmentConfig = AugmentConfig()


class BatchConfig(_Section):
    """global = micro x accumulation x ranks; the accumulation is derived."""

    global_batch: int = Field(ge=1, description="images per optimiser step over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="images per forward pass and rank; null: global / ranks")


class OptimConfig(_Section):
    """SGD with momentum, for the backbone and for the class centres."""

    kind: Literal["sgd"] = "sgd"
    lr_per_1024: float = Field(0.1, gt=0, description="peak learning rate = this x global_batch / 1024")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    clip_norm: float | None = Field(5.0, gt=0, description="largest gradient norm of the backbone; null: no clipping")


class ScheduleConfig(_Section):
    """Linear warm-up, then polynomial decay to zero, stepped once per optimiser step."""

    epochs: float = Field(gt=0, description="passes over the training set")
    warmup_epochs: float = Field(0.0, ge=0)
    power: float = Field(2.0, gt=0, description="exponent of the decay; 2 in arcface_torch")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.warmup_epochs} leaves nothing of schedule.epochs = {self.epochs}; "
                "lower warmup_epochs"
            )
        return self


class EngineConfig(_Section):
    """DeepSpeed, as far as it changes memory, speed or rounding."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed partitions over ranks; 1: optimiser state")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: autocast, with fp32 weights, norms and loss")
    channels_last: bool = Field(True, description="memory layout of images and activations; speed only")
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; null: idle cores / ranks of the machine")
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict, description="further DeepSpeed settings, checked by name"
    )


class CheckpointConfig(_Section):
    """When the state is saved and what is kept."""

    every_steps: int | None = Field(None, ge=1, description="null: once per epoch")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")


class LogConfig(_Section):
    """metrics.jsonl and TensorBoard."""

    every_steps: int = Field(10, ge=1, description="steps between log lines; each costs one host synchronisation")
    tensorboard: bool = Field(True)


class TrainConfig(_Section):
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

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        batch = self.batch
        if batch.micro_batch is not None and batch.global_batch % batch.micro_batch:
            raise ValueError(
                f"batch.global_batch = {batch.global_batch} is not a multiple of "
                f"batch.micro_batch = {batch.micro_batch}"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: proportional to the global batch."""
        return self.optim.lr_per_1024 * self.batch.global_batch / 1024
