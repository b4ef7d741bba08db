"""One optimiser step of backbone and class centres together: check on all ranks, unscale, clip, apply or skip.

Whether a step is applied is decided on the device, so that the host need not wait for it: the kernels of the optimisers
read the verdict, and the host reads it when it likes. Only fp16 asks at once, for the loss scale of the next step
depends on the answer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aroface.config.schema import OptimConfig
from aroface.distributed import all_reduce
from aroface.engine.loss_scale import LossScaler
from aroface.errors import ArofaceError
from aroface.heads import HeadSGD, ShardedHead
from aroface.later import Later

__all__ = ["Gate", "Gradients", "JointUpdate", "NonFiniteError", "StepReport"]

_CLIP_EPS = 1e-6


class NonFiniteError(ArofaceError):
    """NaN or infinity on some rank, nothing was updated; `str` names what, alike on all ranks."""


class Gate(NamedTuple):
    """What the kernels of an optimiser look at before they change anything; scalars in float32 on the device."""

    is_shut: Tensor  #: 1: change nothing, 0: go on
    divisor: Tensor | None  #: of the gradients; None: 1


class Gradients(Protocol):
    """The part of the backbone's engine that a step needs."""

    @property
    def replicas(self) -> int:
        """Ranks that hold each part of the gradient."""
        ...

    def gradients(self) -> Sequence[Tensor]:
        """This rank's parts of the averaged gradient, which `step` will read; changed in place."""
        ...

    def step(self, lr: float, gate: Gate | None = None) -> None:
        """Apply them, unless the gate is shut, and forget them."""
        ...

    def skip(self) -> None:
        """Forget them and change nothing."""
        ...


class StepReport:
    """What one step did.

    Args:
        sums: squared norms of both gradients, as far as clipping counts them, and how many losses are not finite.
        scale: of the loss.
        was_skipped: an fp16 overflow: nothing was changed.
    """

    def __init__(self, sums: Later, *, is_joint: bool, scale: float = 1.0, was_skipped: bool = False) -> None:
        self._sums, self._is_joint, self._scale = sums, is_joint, scale
        self.was_skipped = was_skipped

    @property
    def grad_norm(self) -> float:
        """Before clipping, over what `optim.clip_scope` names; infinite where the step was skipped. Waits for it."""
        backbone, head, _ = self._sums.read()
        return math.inf if self.was_skipped else math.sqrt(backbone + head * self._is_joint) / self._scale

    def check(self) -> None:
        """Wait until the step has been decided on.

        Raises:
            NonFiniteError: on all ranks alike; no weight was changed. An fp16 gradient that overflowed is no error: the
                step was skipped and the scale halved.
        """
        backbone, head, bad_losses = self._sums.read()
        if bad_losses:
            raise NonFiniteError("loss")
        if not math.isfinite(backbone + head) and not self.was_skipped:
            raise NonFiniteError("gradient of the " + ("class centres" if math.isfinite(backbone) else "backbone"))


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
        """Update, or change nothing where loss or gradient is not finite, as the report then says; a collective.

        Args:
            losses: (micro-batches,) unscaled losses of this step.
            lr: learning rate.

        Raises:
            NonFiniteError: at once in fp16 only.
        """
        backbone = self._engine.gradients()
        gradient = self._head.gradient()
        head = [] if gradient is None else [gradient]
        is_bad = (~torch.isfinite(losses)).any().double()
        squares = _sum_of_squares(backbone, losses) / self._engine.replicas, _sum_of_squares(head, losses)
        sums = all_reduce(torch.stack([*squares, is_bad]))
        is_joint = self._config.clip_scope == "joint"
        if self._scaler.is_dynamic:
            return self._update_scaled(Later(sums), backbone, head, lr)
        is_shut = ((sums[2] > 0) | ~torch.isfinite(sums[0] + sums[1])).float()
        divisor = None
        if self._config.clip_norm is not None:
            norm = (sums[0] + sums[1] * is_joint).sqrt()
            divisor = ((norm + _CLIP_EPS) / self._config.clip_norm).clamp_min(1.0).float()
        self._engine.step(lr, Gate(is_shut, divisor))
        self._head_optimizer.step(lr, is_shut=is_shut, divisor=divisor if is_joint else None)
        return StepReport(Later(sums), is_joint=is_joint)

    def _update_scaled(self, sums: Later, backbone: Sequence[Tensor], head: Sequence[Tensor], lr: float) -> StepReport:
        """In fp16: wait for the sums, then unscale and clip, or skip and halve the scale."""
        scale, is_joint = self._scaler.scale, self._config.clip_scope == "joint"
        overflowed = not math.isfinite(sum(sums.read()[:2]))
        report = StepReport(sums, is_joint=is_joint, scale=scale, was_skipped=overflowed)
        report.check()
        if overflowed:
            self._engine.skip()
            self._head_optimizer.clear()
        else:
            limit = self._config.clip_norm
            clip = 1.0 if limit is None else min(1.0, limit / (report.grad_norm + _CLIP_EPS))
            _multiply(backbone, clip / scale)
            _multiply(head, (clip if is_joint else 1.0) / scale)
            self._engine.step(lr)
            self._head_optimizer.step(lr)
        self._scaler.update(overflowed=overflowed)
        return report


def _sum_of_squares(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Scalar on the device of `like`, in float64, for the square of a large fp32 norm is not an fp32 number."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


def _multiply(tensors: Sequence[Tensor], factor: float) -> None:
    if factor != 1.0 and tensors:
        torch._foreach_mul_(list(tensors), factor)
