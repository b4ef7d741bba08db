"""The factor on an fp16 loss: doubled after a quiet while, halved when a gradient overflows. Always 1 elsewhere.

The engine scales by itself rather than through DeepSpeed: the class centres lie outside of DeepSpeed and carry the same
factor, and both have to skip a step together, on all ranks.
"""

from typing import Any

from aroface.config.engine import EngineConfig
from aroface.errors import ArofaceError

__all__ = ["LossScaler"]


class LossScaler:
    """The present factor.

    Args:
        config: precision and limits of the scale.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._limits = config.loss_scale
        self.is_dynamic = config.precision == "fp16"
        self.scale = self._limits.initial if self.is_dynamic else 1.0
        self._quiet_steps = 0

    def update(self, *, overflowed: bool) -> None:
        """Take note of one optimiser step.

        Raises:
            ArofaceError: the gradient overflows at the smallest factor that is allowed.
        """
        if not self.is_dynamic:
            return
        if overflowed:
            if self.scale / 2 < self._limits.minimum:
                raise ArofaceError(
                    f"The fp16 gradient overflows at a loss scale of {self.scale:g}, and half of it would be below "
                    f"engine.loss_scale.minimum = {self._limits.minimum:g}. Training has diverged: lower "
                    "optim.lr_per_1024, or set engine.precision: bf16."
                )
            self.scale /= 2
            self._quiet_steps = 0
            return
        self._quiet_steps += 1
        if self._quiet_steps >= self._limits.window:
            self.scale *= 2
            self._quiet_steps = 0

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; None where there is nothing to remember."""
        return {"scale": self.scale, "quiet_steps": self._quiet_steps} if self.is_dynamic else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`."""
        if self.is_dynamic and state is not None:
            self.scale, self._quiet_steps = float(state["scale"]), int(state["quiet_steps"])
