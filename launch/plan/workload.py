"""What has to be known of a configuration to plan it."""

import math
from dataclasses import dataclass

from aroface.config import TrainConfig
from aroface.engine.schedule import accumulation_steps
from launch.plan.backbone import BackboneCounts
from launch.plan.passes import extra_passes

__all__ = ["Workload", "workload_of"]

_DEEPSPEED_BUCKET = 500_000_000  # numbers; zero_optimization.reduce_bucket_size unless set
_CHUNK = 8192


@dataclass(frozen=True)
class Workload:
    """One training step on a number of GPUs."""

    backbone: BackboneCounts
    precision: str  #: fp32, bf16 or fp16
    zero_stage: int
    bucket_numbers: int  #: DeepSpeed's buffer for gradients on their way, stages 1 to 3
    gpus: int
    micro_batch: int
    accumulation: int
    classes: int
    embedding_dim: int
    sample_rate: float
    chunk_classes: int
    logit_precision: str
    attack_passes: float  #: k p: further forward and backward passes per image, for their input only
    forward_passes: float = 0.0  #: further forward passes per image, through backbone and head
    backbone_passes: float = 0.0  #: further forward passes per image, through the backbone alone

    @property
    def global_batch(self) -> int:
        """Images of an optimiser step."""
        return self.micro_batch * self.accumulation * self.gpus

    @property
    def gathered(self) -> int:
        """N: embeddings that every rank's head sees at once."""
        return self.micro_batch * self.gpus

    @property
    def local_classes(self) -> int:
        """Class centres of the rank that has most."""
        return math.ceil(self.classes / self.gpus)

    @property
    def sampled_classes(self) -> int:
        """Centres of a rank that take part in a step: the sample, and never fewer than its positives."""
        if self.sample_rate >= 1:
            return self.local_classes
        positives = min(self.local_classes, self.micro_batch)  # on average each rank has the classes of so many images
        return max(round(self.sample_rate * self.local_classes), positives)

    @property
    def chunk(self) -> int:
        """Classes whose logits exist at one time."""
        return min(self.chunk_classes, self.sampled_classes)


def workload_of(config: TrainConfig, counts: BackboneCounts, *, gpus: int, classes: int) -> Workload:
    """The workload that a configuration makes.

    Raises:
        ConfigError: batch sizes that do not multiply out over `gpus`.
    """
    accumulation = accumulation_steps(config, gpus)
    extra = extra_passes(config.alignment)
    zero = config.engine.deepspeed_extra.get("zero_optimization", {})
    head = config.head
    return Workload(
        backbone=counts,
        precision="bf16" if config.engine.precision == "auto" else config.engine.precision,  # a plan is for GPUs
        zero_stage=config.engine.zero_stage,
        bucket_numbers=int(zero.get("reduce_bucket_size", _DEEPSPEED_BUCKET)),
        gpus=gpus,
        micro_batch=config.batch.global_batch // (accumulation * gpus),
        accumulation=accumulation,
        classes=classes,
        embedding_dim=config.model.embedding_dim,
        sample_rate=head.sample_rate,
        chunk_classes=head.chunk_classes or _CHUNK,
        logit_precision=getattr(head, "logit_precision", "fp32"),
        attack_passes=extra.gradient,
        forward_passes=extra.forward,
        backbone_passes=extra.backbone,
    )
