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
    def step(self, lr: float, *, is_shut: Tensor | None = None, divisor: Tensor | None = None) -> None:
        """Apply the accumulated gradient and clear it.

        Args:
            lr: learning rate.
            is_shut: 1 on the device: change nothing.
            divisor: of the gradient, on the device. Both are float32 scalars that the host need not know.
        """
        weight, values = self._head.weight, self._head.gradient()
        if values is None or weight.grad is None:
            return
        if not weight.grad.is_sparse:
            self._move(weight, values, self.momentum_buffer, lr, is_shut, divisor)
        else:
            rows = weight.grad.indices()[0]
            moved, momenta = weight[rows], self.momentum_buffer[rows]
            self._move(moved, values, momenta, lr, is_shut, divisor)
            weight.index_copy_(0, rows, moved)
            self.momentum_buffer.index_copy_(0, rows, momenta)
        self.clear()

    def _move(
        self,
        weights: Tensor,
        gradients: Tensor,
        momenta: Tensor,
        lr: float,
        is_shut: Tensor | None,
        divisor: Tensor | None,
    ) -> None:
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
            found_inf=is_shut,
            grad_scale=divisor,
        )

    def clear(self) -> None:
        """Forget the accumulated gradient."""
        self._head.weight.grad = None
