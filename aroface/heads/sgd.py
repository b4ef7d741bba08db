"""SGD for the class centres of one rank, which updates only the centres that took part in the softmax."""

import torch
from torch import Tensor
from torch.optim.sgd import sgd

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
        weight, values = self._head.weight, self._head.gradient()
        if values is None or weight.grad is None:
            return
        if not weight.grad.is_sparse:
            self._move(weight, values, self.momentum_buffer, lr)
        else:
            rows = weight.grad.indices()[0]
            moved, momenta = weight[rows], self.momentum_buffer[rows]
            self._move(moved, values, momenta, lr)
            weight.index_copy_(0, rows, moved)
            self.momentum_buffer.index_copy_(0, rows, momenta)
        self.clear()

    def _move(self, weights: Tensor, gradients: Tensor, momenta: Tensor, lr: float) -> None:
        """In place, in one pass over the three."""
        sgd(
            [weights],
            [gradients],
            [momenta],
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            fused=True,
        )

    def clear(self) -> None:
        """Forget the accumulated gradient."""
        self._head.weight.grad = None
