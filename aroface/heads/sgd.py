"""SGD for the class centres of one rank, which updates only the centres that took part in the softmax."""

import torch
from torch import Tensor

from aroface.heads.class_sharded import ShardedHead

__all__ = ["HeadSGD"]


class HeadSGD:
    """Momentum SGD with weight decay, as `torch.optim.SGD`; with sampling, unsampled centres and momenta rest.

    Args:
        head: whose `weight` is updated in place.
        momentum: of the running direction.
        weight_decay: added to the gradient as `weight_decay * weight`.
    """

    def __init__(self, head: ShardedHead, *, momentum: float, weight_decay: float) -> None:
        self._head = head
        self._momentum, self._weight_decay = momentum, weight_decay
        self.momentum_buffer: Tensor = torch.zeros_like(head.weight)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the accumulated gradient and clear it."""
        weight, gradient, rows = self._head.weight, self._head.weight.grad, self._head.sampled
        if gradient is None:
            return
        if rows is None:
            gradient.add_(weight, alpha=self._weight_decay)
            self.momentum_buffer.mul_(self._momentum).add_(gradient)
            weight.sub_(self.momentum_buffer, alpha=lr)
        else:
            update = gradient[rows].add_(weight[rows], alpha=self._weight_decay)
            moved = self.momentum_buffer[rows].mul_(self._momentum).add_(update)
            self.momentum_buffer[rows] = moved
            weight[rows] = weight[rows].sub_(moved, alpha=lr)
        self.clear()

    def clear(self) -> None:
        """Forget the accumulated gradient and the sampled classes."""
        self._head.weight.grad = None
        self._head.sampled = None
