"""CUDA graphs of the passes beside the main one: one launch instead of thousands.

The attack sends a small part of the batch through the backbone and back, about two thousand kernels for an R100, and
Python takes longer to launch them than a fast GPU takes to run them. A graph holds the launches of a pass: it is
recorded once, at the one shape that the pass has, and replayed from then on; the numbers are those of the pass.

Which passes: the attack, which wants the gradient of its images alone, and those that want none, the corners of
`best_of` and the clean embeddings of a consistency loss. None of them forms a gradient of a weight, and while one is
recorded the weights are constants, so that its graph has no part that adds to `.grad`. Such a part belongs to the
stream on which DeepSpeed's hooks first saw the weight, which a recording must not touch, and keeps the tensor that it
is first given, which the next replay overwrites. The main pass therefore runs as it is; its batch keeps a GPU busy.
"""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from aroface.distributed import any_rank
from aroface.engine.compiled import untouched

__all__ = ["GraphedPasses", "has_graphs"]

logger = logging.getLogger(__name__)

#: Passes before a recording: libraries choose their kernels and set themselves up, which a graph cannot hold.
_REHEARSALS = 3


def has_graphs(device_type: str) -> bool:
    """Whether passes can be recorded there."""
    return device_type == "cuda"


@dataclass(frozen=True)
class _Graph:
    """A graph, and the memory in which it finds its input and leaves its output."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    found: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        self.given.copy_(value)
        self.graph.replay()
        return self.found.clone()


@dataclass(frozen=True)
class _Recorded:
    """A pass."""

    forward: _Graph  #: images to embeddings
    backward: _Graph | None  #: gradient of the embeddings to that of the images; None where none is wanted
    addresses: tuple[int, ...]  #: of the weights and statistics that the graphs read and write


class GraphedPasses:
    """Passes through a backbone that form no gradient of a weight, replayed from graphs.

    A kind of pass is known by shape, gradient and state of the batch norms. It is recorded when it is first seen, which
    leaves no trace in statistics, random numbers and weights. If weights or statistics are found in other memory than
    they were recorded in, all recordings are thrown away. A pass that draws random numbers runs as it is, and so does
    everything after a recording has failed.

    What is handed out, embeddings and gradients, are copies. All recordings share one pool of memory, which keeps the
    activations of the largest kind for the whole run, and a backward pass has to be the next thing after its forward
    pass, for any other pass would overwrite what it needs; it is refused otherwise, and so is a second one.

    Args:
        backbone: on a GPU; no collectives inside, no activation checkpointing, weights that stay where they are.
        autocast: precision of the passes, without autocast's cache, whose tensors a graph would not compute again.
    """

    def __init__(self, backbone: nn.Module, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self._backbone, self._autocast = backbone, autocast
        self._norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
        self._drawing = [module for module in backbone.modules() if isinstance(module, nn.Dropout) and module.p > 0]
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None
        self._turn = 0
        self._is_used = True

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of (B, 3, S, S); with gradients switched on and wanted for the images, theirs follow."""
        if not self._is_used or any(module.training for module in self._drawing):
            return self._run(images)
        recorded = self._find(images)
        if recorded is None:
            return self._run(images)
        embeddings: Tensor = _Replay.apply(images, recorded, self)  # type: ignore[no-untyped-call]
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

    def _run(self, images: Tensor) -> Tensor:
        # Not by a call, whose hooks belong to DeepSpeed: it would note the beginning of a step, and wait for the GPU.
        with self._autocast():
            embeddings: Tensor = self._backbone.forward(images)
        return embeddings

    def _find(self, images: Tensor) -> _Recorded | None:
        """The recording of such a pass, made if need be; None where that fails."""
        has_gradient = torch.is_grad_enabled() and images.requires_grad
        norms = tuple((norm.training, norm.track_running_stats) for norm in self._norms)
        kind = (images.shape, images.dtype, has_gradient, self._backbone.training, norms)
        recorded, addresses = self._recorded.get(kind), self._addresses()
        if recorded is not None and recorded.addresses == addresses:
            return recorded
        if recorded is not None:
            self._forget()
        try:
            recorded = self._recorded[kind] = self._record(images.detach(), has_gradient, addresses)
        except Exception as error:  # CUDA, its libraries and Triton raise of every kind
            pool = self._pool
            self._give_up()
            _recover(pool, images.device)
            logger.warning(
                "Passes beside the main one could not be recorded and run as they are, slower: %s: %s. "
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
        return tuple(t.data_ptr() for t in chain(self._backbone.parameters(), self._backbone.buffers()))

    def _record(self, like: Tensor, has_gradient: bool, addresses: tuple[int, ...]) -> _Recorded:
        """Record a pass over images such as these.

        By hand, because `torch.cuda.make_graphed_callables` hands out the graph's own memory as gradients and lets no
        other thread of the process, such as one that pins memory, use CUDA in the meantime.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        images = torch.empty_like(like).copy_(like).requires_grad_(has_gradient)
        gc.collect()  # what dies while a graph is recorded would be freed into it
        stream = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
        # The outer block puts the stream back that a recording leaves behind when it fails.
        with untouched(self._backbone), _constant(self._backbone), torch.cuda.stream(stream):
            torch.cuda.synchronize()
            for _ in range(_REHEARSALS):
                self._rehearse(images, has_gradient)
            torch.cuda.synchronize()
            graph, way_back = torch.cuda.CUDAGraph(), None
            with self._recording(graph, stream):
                embeddings = self._run(images)
            forward = _Graph(graph, images, embeddings.detach())
            if has_gradient:
                graph, upstream = torch.cuda.CUDAGraph(), torch.empty_like(embeddings)
                with self._recording(graph, stream):
                    (gradient,) = torch.autograd.grad(embeddings, images, upstream)
                way_back = _Graph(graph, upstream, gradient)
            torch.cuda.synchronize()
        return _Recorded(forward, way_back, addresses)

    def _rehearse(self, images: Tensor, has_gradient: bool) -> None:
        embeddings = self._run(images)
        if has_gradient:
            torch.autograd.grad(embeddings, images, torch.ones_like(embeddings))

    def _recording(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        return torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, recorded: _Recorded, passes: GraphedPasses) -> Tensor:
        ctx.recorded, ctx.passes, ctx.turn = recorded, passes, passes.take_turn()
        return recorded.forward(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.passes.is_turn(ctx.turn):
            raise RuntimeError("a replayed pass needs its backward pass before any other pass, and once")
        ctx.passes.take_turn()
        return ctx.recorded.backward(upstream), None, None


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
def _constant(module: nn.Module) -> Iterator[None]:
    """No weight has a gradient inside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
