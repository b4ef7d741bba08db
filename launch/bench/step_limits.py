"""Operations and bytes that a training step cannot do without, and the seconds that they take at this machine's peaks.

Legend: B images of a batch, F operations of the backbone's forward pass on all of them, H = 2 B C D operations of the
head's logits (C classes, D numbers of an embedding), n = round(p B) images that are attacked, k steps of the attack.

- The plain step: 3 F + 3 H. The backward pass computes a gradient of the data and one of the weights, each as many
  operations as the forward pass; that of the pixels, which nobody reads, is 0.2 % of it and stays counted.
- Sign ascent (adversarial, elastic) adds k n / B (2 F + 2 H): a forward pass, and of the backward pass the gradient of
  the data alone. The published code attacks all B images, so it adds k (2 F + 2 H).
- `best_of` adds n / B (F + H) for each candidate. `random` and `delayed` add nothing that counts.
- Bytes: each weight and its momentum, read and written once, 16 bytes for each parameter of backbone and head. What
  lies between the layers is not counted, for a layer could hand it on in the cache; so memory-bound layers (BatchNorm,
  PReLU, the sum of a residual) show as distance from the limit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.bench.roofline import Peaks, Precision

if TYPE_CHECKING:
    from aroface.config import TrainConfig
    from aroface.config.alignment import AlignmentConfig

__all__ = ["StepLimits", "limits_of"]

_STATE_BYTES = 16  # of a parameter in a step: weight and momentum, in and out, float32
_OPTIMISER_BYTES = 20  # its gradient too, which a step could hand on


@dataclass(frozen=True)
class StepLimits:
    """Least seconds of a step and of its parts."""

    peaks: Peaks
    batch: int
    forward_flops: float  #: F
    head_flops: float  #: H
    parameters: int  #: of backbone and head
    precision: Precision  #: of the backbone
    head_precision: Precision

    def step_s(self, alignment: "AlignmentConfig") -> float:
        """Of a whole step in the way that a section `alignment` says."""
        forwards, logits = self._passes(alignment)
        state = self.peaks.limit_s(moved_bytes=_STATE_BYTES * self.parameters)
        return max(self._arithmetic_s(3 + forwards, 3 + logits), state)

    def parts_s(self, alignment: "AlignmentConfig") -> dict[str, float]:
        """Of the parts that have a limit, by their names in the report."""
        return {
            "attack": self._arithmetic_s(*self._passes(alignment)),
            "forward": self._arithmetic_s(1, 0),
            "head, forward": self._arithmetic_s(0, 1),
            "backward": self._arithmetic_s(2, 2),
            "optimisers": self.peaks.limit_s(moved_bytes=_OPTIMISER_BYTES * self.parameters),
        }

    def _passes(self, alignment: "AlignmentConfig") -> tuple[float, float]:
        """Multiples of F and of H that the attack takes."""
        share = round(alignment.share * self.batch) / self.batch
        if alignment.release_compat:
            share = 1.0
        match alignment.kind:
            case "adversarial" | "elastic":
                return 2 * alignment.steps * share, 2 * alignment.steps * share
            case "best_of":
                return alignment.candidates * share, alignment.candidates * share
        return 0.0, 0.0

    def _arithmetic_s(self, forwards: float, logits: float) -> float:
        backbone = self.peaks.limit_s(forwards * self.forward_flops, precision=self.precision)
        return backbone + self.peaks.limit_s(logits * self.head_flops, precision=self.head_precision)


def limits_of(config: "TrainConfig", *, classes: int, peaks: Peaks) -> StepLimits:
    """Count the operations of a configuration on shapes alone.

    Args:
        config: of the step; one rank, no accumulation.
        classes: of the head.
        peaks: of the device that the step runs on.
    """
    import torch

    from aroface.models import build_backbone
    from launch.bench.backbones import forward_flops

    batch, side, dim = config.batch.global_batch, config.model.image_size, config.model.embedding_dim
    with torch.device("meta"):
        backbone = build_backbone(config.model)
    parameters = sum(p.numel() for p in backbone.parameters()) + classes * dim
    flops = forward_flops(backbone, torch.empty(batch, 3, side, side, device="meta"))
    head_flops = 2.0 * batch * classes * dim
    precision, head_precision = config.engine.decided_precision, config.head.logit_precision
    return StepLimits(peaks, batch, flops, head_flops, parameters, precision, head_precision)
