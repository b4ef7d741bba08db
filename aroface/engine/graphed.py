"""CUDA graphs of the passes through the backbone: one launch instead of thousands.

An R100 takes about two thousand kernels forward and back, and Python takes longer to launch them than a fast GPU takes
to run them, most of all in the attack, whose batch is small. A graph holds the launches of a pass: it is recorded once,
at the one shape that the pass has, and replayed from then on; the numbers are those of the pass.

Which passes: the main one, the attack, which wants the gradient of its images alone, and those that want none, the
corners of `best_of` and the clean embeddings of a consistency loss. No part of a graph may add to a weight's `.grad`:
such a part belongs to the stream on which DeepSpeed's hooks first saw the weight, which a recording must not touch, and
keeps the tensor that it is first given, which the next replay overwrites. So weights are constants while a pass beside
the main one is recorded, and in the main one other tensors over the same memory stand in for them. Their gradients are
handed out as copies when a replay has ended; all of them then reach `.grad`, and DeepSpeed, at one time.
"""

import gc
import logging
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from aroface.distributed import any_rank
from aroface.engine.compiled import untouched

__all__ = ["GraphedBackbone", "GraphedPasses", "has_graphs"]

logger = logging.getLogger(__name__)

#: Passes before a recording: libraries choose their kernels and set themselves up, which a graph cannot hold.
_REHEARSALS = 3


def has_graphs(device_type: str) -> bool:
    """Whether passes can be recorded there."""
    return device_type == "cuda"


class _Wanted(NamedTuple):
    """What a backward pass has to form."""

    images: bool
    weights: bool


@dataclass(frozen=True)
class _Graph:
    """A graph, and the memory in which it finds its input and leaves its output."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    found: tuple[Tensor, ...]

    def __call__(self, value: Tensor) -> list[Tensor]:
        self.given.copy_(value)
        self.graph.replay()
        return [found.clone() for found in self.found]


@dataclass(frozen=True)
class _Recorded:
    """A pass."""

    wanted: _Wanted
    forward: _Graph  #: images to embeddings
    #: Gradient of the embeddings to that of the images and, one after the other in one tensor, of the trained weights,
    #: as far as they are wanted; None where neither is.
    backward: _Graph | None
    addresses: tuple[int, ...]  #: of the weights and statistics that the graphs read and write


class GraphedPasses:
    """Passes through a backbone, replayed from graphs.

    A kind of pass is known by shape, gradients and state of the batch norms. It is recorded when it is first seen,
    which leaves no trace in statistics, random numbers and weights. If weights or statistics are found in other memory
    than they were recorded in, all recordings are thrown away. A pass that draws random numbers runs as it is, and so
    does everything after a recording has failed.

    What is handed out, embeddings and gradients, are copies. All recordings share one pool of memory, which keeps the
    activations of the largest kind for the whole run, and a backward pass has to be the next thing after its forward
    pass, for any other pass would overwrite what it needs; it is refused otherwise, and so is a second one.

    Args:
        backbone: on a GPU; no collectives inside, no activation checkpointing, weights that stay where they are, each
            of which takes part in the embeddings.
        autocast: precision of the passes, without autocast's cache, whose tensors a graph would not compute again.
    """

    def __init__(self, backbone: nn.Module, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self._backbone, self._autocast = backbone, autocast
        self._modules = list(backbone.modules())
        self._norms = [module for module in self._modules if isinstance(module, _BatchNorm)]
        self._drawing = [module for module in self._modules if isinstance(module, nn.Dropout) and module.p > 0]
        self._trained = {name: weight for name, weight in backbone.named_parameters() if weight.requires_grad}
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None
        self._turn = 0
        self._is_used = True

    def __call__(self, images: Tensor, *, is_main: bool = False) -> Tensor:
        """Embeddings of (B, 3, S, S).

        Args:
            images: with gradients switched on and wanted for them, theirs follow.
            is_main: with gradients switched on, those of the trained weights follow; otherwise weights are constants.
        """
        recorded = None
        if self._is_used and not any(module.training for module in self._drawing):
            has_gradients = torch.is_grad_enabled()
            of_weights = has_gradients and is_main and bool(self._trained)
            recorded = self._find(images, _Wanted(has_gradients and images.requires_grad, of_weights))
        if recorded is None:
            return self._run(images)
        weights = self._trained.values() if recorded.wanted.weights else ()
        embeddings: Tensor = _Replay.apply(images, recorded, self, *weights)  # type: ignore[no-untyped-call]
        return embeddings

    def settle(self, *, is_told: bool) -> None:
        """Give up on all ranks what one of them could not record; a collective, after each has tried.

        Args:
            is_told: whether this rank says so.
        """
        if any_rank(not self._is_used):
            if self._is_used and is_told:
                logger.warning("Another rank could not record its passes; they run as they are on all ranks, slower.")
            self._give_up()
        elif is_told:
            logger.info("Passes that are replayed from CUDA graphs (engine.cuda_graphs): %d recorded.", self.count)

    @property
    def count(self) -> int:
        """Kinds of pass that are recorded."""
        return len(self._recorded)

    def take_turn(self) -> int:
        """The memory of all graphs belongs to whoever took the last turn."""
        self._turn += 1
        return self._turn

    def is_turn(self, turn: int) -> bool:
        """Whether no other pass was replayed since."""
        return turn == self._turn

    def _run(self, images: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        # Hooks on the network itself are passed by, except where other weights stand in for its own; DeepSpeed has its
        # hooks on `GraphedBackbone`.
        with self._autocast():
            embeddings: Tensor = (
                functional_call(self._backbone, weights, (images,)) if weights else self._backbone.forward(images)
            )
        return embeddings

    def _find(self, images: Tensor, wanted: _Wanted) -> _Recorded | None:
        """The recording of such a pass, made if need be; None where that fails."""
        norms = tuple((norm.training, norm.track_running_stats) for norm in self._norms)
        kind = (images.shape, images.dtype, wanted, self._backbone.training, norms)
        recorded, addresses = self._recorded.get(kind), self._addresses()
        if recorded is not None and recorded.addresses == addresses:
            return recorded
        if recorded is not None:
            self._forget()
        try:
            recorded = self._recorded[kind] = self._record(images.detach(), wanted, addresses)
        except Exception as error:  # CUDA, its libraries and Triton raise of every kind
            pool = self._pool
            self._give_up()
            _recover(pool, images.device)
            logger.warning(
                "Passes could not be recorded as CUDA graphs and run as they are, slower: %s: %s. "
                "engine.cuda_graphs: false silences this.",
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
            return None
        return recorded

    def _give_up(self) -> None:
        self._is_used = False
        self._forget()

    def _forget(self) -> None:
        self._recorded.clear()
        self._pool = None  # a pool without graphs takes no new ones

    def _addresses(self) -> tuple[int, ...]:
        found = chain.from_iterable((*m._parameters.values(), *m._buffers.values()) for m in self._modules)
        return tuple(tensor.data_ptr() for tensor in found if tensor is not None)

    def _record(self, like: Tensor, wanted: _Wanted, addresses: tuple[int, ...]) -> _Recorded:
        """Record a pass over images such as these.

        By hand, because `torch.cuda.make_graphed_callables` hands out the graph's own memory as gradients and lets no
        other thread of the process, such as one that pins memory, use CUDA in the meantime.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        images = torch.empty_like(like).copy_(like).requires_grad_(wanted.images)
        stream = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
        # The outer block puts the stream back that a recording leaves behind when it fails.
        with untouched(self._backbone), _constant(self._trained.values()), torch.cuda.stream(stream):
            weights = {}
            if wanted.weights:
                weights = {name: weight.detach().requires_grad_() for name, weight in self._trained.items()}
            torch.cuda.synchronize()
            for _ in range(_REHEARSALS):
                self._rehearse(images, weights)
            torch.cuda.synchronize()
            gc.collect()  # what dies while a graph is recorded would be freed into it
            graph, way_back = torch.cuda.CUDAGraph(), None
            with self._recording(graph, stream):
                embeddings = self._run(images, weights)
            forward = _Graph(graph, images, (embeddings.detach(),))
            if any(wanted):
                graph, upstream = torch.cuda.CUDAGraph(), torch.empty_like(embeddings)
                with self._recording(graph, stream):
                    gradients = _gradients(embeddings, upstream, images, weights)
                way_back = _Graph(graph, upstream, gradients)
            torch.cuda.synchronize()
        return _Recorded(wanted, forward, way_back, addresses)

    def _rehearse(self, images: Tensor, weights: dict[str, Tensor]) -> None:
        embeddings = self._run(images, weights)
        if embeddings.requires_grad:
            _gradients(embeddings, torch.ones_like(embeddings), images, weights)

    def _recording(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        return torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")

    def gradients_of(self, recorded: _Recorded, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of the images, None if not wanted, and of the trained weights if they are."""
        assert recorded.backward is not None  # noqa: S101 - autograd asks only for what is wanted
        found = recorded.backward(upstream)
        images = found.pop(0) if recorded.wanted.images else None
        if not found:
            return (images,)
        trained = self._trained.values()
        parts = torch.split(found.pop(), [weight.numel() for weight in trained])
        return images, *(part.view_as(weight) for part, weight in zip(parts, trained, strict=True))


class GraphedBackbone(nn.Module):
    """What DeepSpeed trains: the main pass of a backbone, replayed from a graph where it can be."""

    def __init__(self, backbone: nn.Module, passes: GraphedPasses) -> None:
        super().__init__()
        self.backbone = backbone
        self._passes = passes

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of (B, 3, S, S)."""
        with torch.autocast(images.device.type, enabled=False):  # DeepSpeed's, which caches weights; the passes' own
            return self._passes(images, is_main=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, recorded: _Recorded, passes: GraphedPasses, *weights: Tensor) -> Tensor:
        ctx.recorded, ctx.passes, ctx.turn = recorded, passes, passes.take_turn()
        (embeddings,) = recorded.forward(images)
        return embeddings

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.passes.is_turn(ctx.turn):
            raise RuntimeError("a replayed pass needs its backward pass before any other pass, and once")
        ctx.passes.take_turn()
        images, *weights = ctx.passes.gradients_of(ctx.recorded, upstream)
        return images, None, None, *weights


def _gradients(embeddings: Tensor, upstream: Tensor, images: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the images and of the weights, these in one tensor, as far as they are wanted."""
    of = ([images] if images.requires_grad else []) + list(weights.values())
    found = list(torch.autograd.grad(embeddings, of, upstream))
    of_images = (found.pop(0),) if images.requires_grad else ()
    return (*of_images, torch.cat([gradient.flatten() for gradient in found])) if found else of_images


def _recover(pool: Any, device: torch.device) -> None:
    """Bring PyTorch out of a recording that failed.

    2.11 leaves its allocator in it, which then frees no memory, and the generator of the GPU, which then draws nothing;
    later versions mind the allocator themselves. A recording that succeeds puts the generator back.
    """
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)


@contextmanager
def _constant(trained: Collection[Tensor]) -> Iterator[None]:
    """No weight has a gradient inside."""
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
