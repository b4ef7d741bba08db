"""The kinds of heads: each says what becomes of targets and negatives, and owns its running statistics.

A kind sees the whole global batch on every rank, so its statistics are the same on all of them.

Legend: N images of the global batch, M of them with a class of this rank.
"""

import torch
from torch import Tensor, nn

from aroface.config.head import (
    AdaFaceConfig,
    ArcFaceConfig,
    CombinedMarginConfig,
    CosFaceConfig,
    CurricularFaceConfig,
    HeadConfig,
    MagFaceConfig,
)
from aroface.heads.margins import (
    ada_margin,
    ada_scaler,
    arc_margin,
    combined_margin,
    cos_margin,
    mag_margins,
    mag_regulariser,
    shifted_cosines,
)
from aroface.heads.negatives import CurricularNegatives, FilteredNegatives, NegativeRule

__all__ = ["HeadKind", "build_kind"]

#: AdaFace's starting point of the running norm statistics.
_NORM_MEAN, _NORM_STD = 20.0, 100.0
_NORM_RANGE = (1e-3, 100.0)


class HeadKind(nn.Module):
    """A margin without statistics. Buffers of the children are running statistics and go into checkpoints."""

    #: Whether `negatives` wants the target cosines of the whole batch, which costs one more exchange.
    needs_target_cosines: bool = False

    def __init__(self, interclass_filter: float | None = None) -> None:
        super().__init__()
        self._filter = None if interclass_filter is None else FilteredNegatives(interclass_filter)

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """Target logits before the scale, (M,), of cosines (M,) in [-1, 1] and embedding norms (M,)."""
        raise NotImplementedError

    def negatives(self, target_cosines: Tensor) -> NegativeRule | None:
        """What becomes of the negatives; None: nothing. `target_cosines`: (N,), or (0,) where the kind needs none."""
        return self._filter

    def regulariser(self, norms: Tensor) -> Tensor | None:
        """Added to the loss of each image, (M,); None: nothing."""
        return None

    def update(self, norms: Tensor, target_cosines: Tensor) -> None:
        """Move the running statistics by one global batch, before its loss; norms (N,), cosines as `negatives`."""


class ArcFaceKind(HeadKind):
    """See `arc_margin`."""

    def __init__(self, config: ArcFaceConfig) -> None:
        super().__init__(config.interclass_filter)
        self._config = config

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        config = self._config
        return arc_margin(cosines, config.margin, gradient=config.margin_gradient, continuation=config.continuation)


class CosFaceKind(HeadKind):
    """See `cos_margin`."""

    def __init__(self, config: CosFaceConfig) -> None:
        super().__init__(config.interclass_filter)
        self._config = config

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        return cos_margin(cosines, self._config.margin)


class CombinedKind(HeadKind):
    """See `combined_margin`."""

    def __init__(self, config: CombinedMarginConfig) -> None:
        super().__init__(config.interclass_filter)
        self._config = config

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        config = self._config
        return combined_margin(
            cosines,
            config.m1,
            config.m2,
            config.m3,
            gradient=config.margin_gradient,
            continuation=config.continuation,
        )


class AdaFaceKind(HeadKind):
    """See `ada_margin`; running mean and standard deviation of the embedding norms."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, config: AdaFaceConfig) -> None:
        super().__init__(config.interclass_filter)
        self._config = config
        self.register_buffer("norm_mean", torch.tensor(_NORM_MEAN))
        self.register_buffer("norm_std", torch.tensor(_NORM_STD))

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        scaler = ada_scaler(norms, self.norm_mean, self.norm_std, self._config.h)
        return ada_margin(cosines, self._config.margin, scaler, gradient=self._config.margin_gradient)

    def update(self, norms: Tensor, target_cosines: Tensor) -> None:
        clipped = norms.clamp(*_NORM_RANGE)
        momentum = self._config.statistics_momentum
        self.norm_mean.lerp_(clipped.mean(), momentum)
        if len(clipped) > 1:  # one image has no spread
            self.norm_std.lerp_(clipped.std(), momentum)


class CurricularFaceKind(HeadKind):
    """See `CurricularNegatives`; the targets are those of ArcFace."""

    t: Tensor
    needs_target_cosines = True

    def __init__(self, config: CurricularFaceConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("t", torch.tensor(0.0))

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        config = self._config
        return arc_margin(cosines, config.margin, gradient=config.margin_gradient, continuation=config.continuation)

    def negatives(self, target_cosines: Tensor) -> NegativeRule | None:
        return CurricularNegatives(shifted_cosines(target_cosines, self._config.margin), self.t.clone())

    def update(self, norms: Tensor, target_cosines: Tensor) -> None:
        self.t.lerp_(target_cosines.mean(), self._config.statistics_momentum)


class MagFaceKind(HeadKind):
    """See `mag_margins` and `mag_regulariser`."""

    def __init__(self, config: MagFaceConfig) -> None:
        super().__init__(config.interclass_filter)
        self._config = config
        self._norms = (config.lower_norm, config.upper_norm)

    def targets(self, cosines: Tensor, norms: Tensor) -> Tensor:
        margins = mag_margins(norms, self._norms, (self._config.lower_margin, self._config.upper_margin))
        return arc_margin(cosines, margins, continuation=self._config.continuation)

    def regulariser(self, norms: Tensor) -> Tensor | None:
        return self._config.regulariser_weight * mag_regulariser(norms, self._norms)


def build_kind(config: HeadConfig) -> HeadKind:
    """The kind that a configuration names."""
    match config:
        case ArcFaceConfig():
            return ArcFaceKind(config)
        case CosFaceConfig():
            return CosFaceKind(config)
        case CombinedMarginConfig():
            return CombinedKind(config)
        case AdaFaceConfig():
            return AdaFaceKind(config)
        case CurricularFaceConfig():
            return CurricularFaceKind(config)
        case MagFaceConfig():
            return MagFaceKind(config)
