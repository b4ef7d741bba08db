"""A step from the moment it was asked of the device until the host knows that it was taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from aroface.distributed import rank
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

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Tell a loss or gradient that is not finite together with the images that it came from."""
        try:
            yield
        except NonFiniteError as error:
            names = ", ".join(self.describe(sample) for sample in self.samples[:8].tolist())
            raise ArofaceError(
                f"Step {self.number}: the {error} is not finite (loss {float(self.losses.mean()):.4g} on rank "
                f"{rank()}). Nothing was updated; the newest checkpoint is good. The batch of this rank begins with "
                f"{names}. Look at these images, lower optim.lr_per_1024, lengthen schedule.warmup_epochs, or set "
                "engine.precision: fp32."
            ) from error
