"""Numbers that the host wants to know, but not at once."""

import torch
from torch import Tensor

__all__ = ["Later"]


class Later:
    """A few numbers on their way from the device to the host.

    Reading a tensor waits for everything that was asked of the device before; reading these waits for the work that was
    asked before they were sent, while later work goes on.

    Args:
        values: on any device; may be overwritten afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._sent: torch.cuda.Event | None = None
        self._found: list[float] | None = None
        if not values.is_cuda:
            self._values = values.clone()
            return
        self._values = torch.empty_like(values, device="cpu", pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._sent = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._sent.record()

    def read(self) -> list[float]:
        """The numbers; waits until they are here."""
        if self._found is None:
            if self._sent is not None:
                self._sent.synchronize()
            self._found = self._values.tolist()
        return self._found
