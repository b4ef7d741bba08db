"""A step from the moment it was asked of the device until the host knows that it was taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aroface.distributed import rank
from aroface.engine.checkpoint_layout import list_checkpoints
from aroface.engine.joint_update import NonFiniteError
from aroface.errors import ArofaceError

__all__ = ["AppliedStep"]


@dataclass(frozen=True)
class AppliedStep:
    """What has to be told if it was not taken."""

    number: int  #: counted from 1
    losses: Tensor  #: (micro-batches,)
    samples: Tensor  #: of this rank
    describe: Callable[[int], str]  #: names a sample
    run: Path  #: where checkpoints lie, if there are any
    precision: str

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Tell a loss or gradient that is not finite together with the images that it came from."""
        try:
            yield
        except NonFiniteError as error:
            names = ", ".join(self.describe(sample) for sample in self.samples[:8].tolist())
            kept = (
                "the newest checkpoint is good" if list_checkpoints(self.run) else f"{self.run} has no checkpoint yet"
            )
            ways = ["lower optim.lr_per_1024", "lengthen schedule.warmup_epochs"]
            if self.precision != "fp32":
                ways.append("set engine.precision: fp32")
            raise ArofaceError(
                f"Step {self.number}: the {error} is not finite (loss {float(self.losses.mean()):.4g} on rank "
                f"{rank()}). Nothing was updated; {kept}. The batch of this rank begins with {names}. "
                f"Look at these images, {', '.join(ways[:-1])}, or {ways[-1]}."
            ) from error
