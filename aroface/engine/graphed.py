"""CUDA graphs of the passes through the backbone: one launch instead of two thousand.

A step of an R100 launches about two thousand kernels, and Python takes longer to launch them than a fast GPU takes to
run them, above all in the attack, whose batch is small. A graph is recorded once for each kind of pass (main pass,
attack) at its one shape and replayed from then on; the numbers are the same.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aroface.engine.compiled import untouched

__all__ = ["GraphedBackbone"]


@dataclass(frozen=True)
class _Recorded:
    call: Callable[[Tensor], Tensor]
    addresses: tuple[int, ...]  #: of the parameters and buffers that the graph reads and writes


class GraphedBackbone(nn.Module):
    """A backbone whose passes with gradients, in training mode on a GPU, are replayed from graphs.

    A pass is recorded when it is first seen, which leaves no trace in statistics or random numbers, and again if a
    parameter has moved to other memory. Each forward pass must be followed by its backward pass before the next forward
    pass of the same kind, for both use the memory of the graph; all graphs share one pool of memory, so what one kind
    of pass leaves for its backward pass must not be needed after a pass of another kind either. All other calls go to
    the backbone as it is.

    Args:
        backbone: on its device; no collectives inside, no activation checkpointing.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.is_used = True
        self._trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        self._norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of (B, 3, S, S)."""
        if not self._is_replayed(images):
            embeddings: Tensor = self.backbone(images)
            return embeddings
        kind = self._kind(images)
        recorded = self._recorded.get(kind)
        if recorded is None or recorded.addresses != self._addresses():
            recorded = self._recorded[kind] = _Recorded(self._record(images), self._addresses())
        return recorded.call(images).clone()  # the graph's own output is overwritten by the next replay

    def _is_replayed(self, images: Tensor) -> bool:
        wants_gradient = images.requires_grad or self._trained[0].requires_grad
        return self.is_used and images.is_cuda and self.training and torch.is_grad_enabled() and wants_gradient

    def _kind(self, images: Tensor) -> Hashable:
        """What a graph depends on besides the numbers in its memory."""
        norms = tuple((norm.training, norm.track_running_stats) for norm in self._norms[:1])
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return images.shape, images.dtype, images.requires_grad, self._trained[0].requires_grad, norms, precision

    def _addresses(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in chain(self._trained, self.backbone.buffers()))

    def _record(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        sample = images.detach().clone().requires_grad_(images.requires_grad)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with untouched(self.backbone), torch.autocast("cuda", enabled=False):
            one = _Pass(self.backbone, precision)
            torch.cuda.make_graphed_callables(one, (sample,), pool=self._pool)  # replaces its `forward`
        return one


class _Pass(nn.Module):
    """The backbone in the precision of one kind of pass, without autocast's cache, which graphs cannot have."""

    def __init__(self, backbone: nn.Module, precision: torch.dtype | None) -> None:
        super().__init__()
        self.backbone = backbone
        self._precision = precision

    def forward(self, images: Tensor) -> Tensor:
        dtype = self._precision or torch.bfloat16
        with torch.autocast("cuda", dtype=dtype, enabled=self._precision is not None, cache_enabled=False):
            embeddings: Tensor = self.backbone(images)
        return embeddings
