"""What one image costs in a backbone, counted on the real network with tensors that have shapes and no data."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from aroface.config.model import ModelConfig
from aroface.models import build_backbone

__all__ = ["BackboneCounts", "StorageMeter", "count_backbone"]

#: The difference of two batch sizes is what an image costs; large ones, so that images outweigh gradients at the peak.
_BATCHES = (64, 128)
_FORWARD_AND_BACKWARD = 3  # the backward pass is twice the forward pass


@dataclass(frozen=True)
class BackboneCounts:
    """Counts of one backbone at one precision."""

    parameters: int
    forward_flop: float  #: per image; a multiplication and an addition are two
    recomputed_flop: float  #: per image, in the backward pass, with checkpointed activations
    activation_bytes: float  #: per image, at the peak of forward and backward pass
    fixed_bytes: float  #: at that peak, whatever the batch: low-precision copies of weights, gradients

    @property
    def training_flop(self) -> float:
        """Per image, forward and backward pass."""
        return _FORWARD_AND_BACKWARD * self.forward_flop + self.recomputed_flop


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations inside the block have made: now, and at the most.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = list(known)
        self._seen = {tensor.untyped_storage()._cdata for tensor in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_sparse:
            self._add(tensor._indices())
            self._add(tensor._values())
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def count_backbone(config: ModelConfig, *, precision: str) -> BackboneCounts:
    """Count parameters, arithmetic and memory of a backbone.

    Args:
        config: the section `model`.
        precision: `engine.precision`; with anything but fp32, auto included, the convolutions see two-byte numbers.
    """
    with FakeTensorMode():
        backbone = build_backbone(config).train()
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        forward, both = _flop(backbone, config.image_size)
        small, large = (_peak(backbone, config.image_size, batch, precision) for batch in _BATCHES)
    per_image = (large - small) / (_BATCHES[1] - _BATCHES[0])
    return BackboneCounts(
        parameters=parameters,
        forward_flop=forward,
        recomputed_flop=max(0.0, both - _FORWARD_AND_BACKWARD * forward) if config.checkpoint_activations else 0.0,
        activation_bytes=per_image,
        fixed_bytes=max(0.0, small - per_image * _BATCHES[0]),
    )


def _flop(backbone: nn.Module, image_size: int) -> tuple[float, float]:
    """Per image: forward pass, and forward and backward pass together."""
    batch = _BATCHES[0]
    images = torch.empty(batch, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        loss = backbone(images).sum()
        forward = counter.get_total_flops()
        loss.backward()
    backbone.zero_grad(set_to_none=True)
    return forward / batch, counter.get_total_flops() / batch


def _peak(backbone: nn.Module, image_size: int, batch: int, precision: str) -> float:
    """Bytes at the peak of a forward and a backward pass, beside parameters and buffers."""
    images = torch.empty(batch, 3, image_size, image_size)
    known = [images, *backbone.parameters(), *backbone.buffers()]
    with StorageMeter(known) as meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            embeddings = backbone(images)
        embeddings.sum().backward()
        del embeddings
    backbone.zero_grad(set_to_none=True)
    return float(meter.peak)
