"""One optimiser step of backbone and class centres together: check on all ranks, unscale, clip, apply or skip."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aroface.config.schema import OptimConfig
from aroface.distributed import all_reduce
from aroface.engine.loss_scale import LossScaler
from aroface.errors import ArofaceError
from aroface.heads import HeadSGD, ShardedHead

__all__ = ["Gradients", "JointUpdate", "NonFiniteError", "StepReport"]

_CLIP_EPS = 1e-6


class NonFiniteError(ArofaceError):
    """NaN or infinity on some rank, nothing was updated; `str` names what, alike on all ranks."""


class Gradients(Protocol):
    """The part of the backbone's engine that a step needs."""

    @property
    def replicas(self) -> int:
        """Ranks that hold each part of the gradient."""
        ...

    def gradients(self) -> Sequence[Tensor]:
        """This rank's parts of the averaged gradient, which `step` will read; changed in place."""
        ...

    def step(self, lr: float) -> None:
        """Apply them and forget them."""
        ...

    def skip(self) -> None:
        """Forget them and change nothing."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    grad_norm: float  #: before clipping, over what `optim.clip_scope` names; infinite where the step was skipped
    was_skipped: bool  #: an fp16 overflow: nothing was changed


class JointUpdate:
    """Steps the backbone and the class centres with one look at both gradients.

    Args:
        engine: of the backbone.
        head: the class centres of this rank.
        head_optimizer: what steps them.
        config: clipping.
        scaler: factor that the loss was multiplied by before its backward pass.
    """

    def __init__(
        self,
        engine: Gradients,
        head: ShardedHead,
        head_optimizer: HeadSGD,
        config: OptimConfig,
        scaler: LossScaler,
    ) -> None:
        self._engine, self._head, self._head_optimizer = engine, head, head_optimizer
        self._config, self._scaler = config, scaler

    @torch.no_grad()
    def __call__(self, losses: Tensor, lr: float) -> StepReport:
        """Update; a collective with one host synchronisation.

        Args:
            losses: (micro-batches,) unscaled losses of this step.
            lr: learning rate.

        Raises:
            NonFiniteError: on all ranks alike, before any weight is changed. An fp16 gradient that overflowed is no
                error: the step is skipped and the scale halved.
        """
        backbone = self._engine.gradients()
        gradient = self._head.gradient()
        head = [] if gradient is None else [gradient]
        is_bad = (~torch.isfinite(losses)).any().double()
        squares = _sum_of_squares(backbone, losses) / self._engine.replicas, _sum_of_squares(head, losses)
        sums = torch.stack([*squares, is_bad])
        backbone_square, head_square, bad_losses = all_reduce(sums).tolist()
        if bad_losses:
            raise NonFiniteError("loss")
        if not math.isfinite(backbone_square + head_square):
            if not self._scaler.is_dynamic:
                raise NonFiniteError(
                    "gradient of the " + ("class centres" if math.isfinite(backbone_square) else "backbone")
                )
            self._engine.skip()
            self._head_optimizer.clear()
            self._scaler.update(overflowed=True)
            return StepReport(math.inf, was_skipped=True)
        is_joint = self._config.clip_scope == "joint"
        norm = math.sqrt(backbone_square + head_square * is_joint) / self._scaler.scale
        clip = 1.0 if self._config.clip_norm is None else min(1.0, self._config.clip_norm / (norm + _CLIP_EPS))
        _multiply(backbone, clip / self._scaler.scale)
        _multiply(head, (clip if is_joint else 1.0) / self._scaler.scale)
        self._engine.step(lr)
        self._head_optimizer.step(lr)
        self._scaler.update(overflowed=False)
        return StepReport(norm, was_skipped=False)


def _sum_of_squares(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Scalar on the device of `like`, in float64, for the square of a large fp32 norm is not an fp32 number."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


def _multiply(tensors: Sequence[Tensor], factor: float) -> None:
    if factor != 1.0 and tensors:
        torch._foreach_mul_(list(tensors), factor)
