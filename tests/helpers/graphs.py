"""CUDA graphs on the CPU: what ran while a graph was recorded runs again, on the memory that it had."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aroface.engine import deepspeed_engine


class StandIn:
    """In place of `torch.cuda.CUDAGraph`: operations below autograd and autocast, in order, on fixed tensors.

    As in a graph, Python does not run again, numbers that it passed are constants, results lie where they lay, and
    nothing of them is there before the first replay. Unlike a graph, recording also runs the operations.
    """

    def __init__(self):
        self.operations = []
        self.pool = None
        self.replays = 0

    def replay(self):
        assert self.operations
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                for old, new in zip(results, tree_leaves(function(*args, **kwargs)), strict=True):
                    if old is not None:
                        old.copy_(new)

    def forget_results(self):
        for *_, results in self.operations:
            for result in results:
                if result is not None and result.is_floating_point():
                    result.data.fill_(torch.nan)  # unnoticed by the backward pass that is yet to be recorded


class _Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        given = {_memory(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        own = [
            result if isinstance(result, torch.Tensor) and _memory(result) not in given else None
            for result in tree_leaves(results)
        ]
        self.graph.operations.append((func, args, kwargs, own))
        return results


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """What was recorded, in order; `fails` makes the next recording fail."""

    def __init__(self):
        self.graphs = []
        self.recovered = 0
        self.fails = False
        self.pools = 0

    def new_pool(self):
        self.pools += 1
        return f"pool {self.pools}"

    @contextmanager
    def record(self, graph, *, pool=None, stream=None, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert not torch.is_autocast_enabled("cpu")
        if self.fails:
            self.fails = False
            raise RuntimeError("operation not permitted when\nstream is capturing")
        if pool is None:
            yield
            self.recovered += 1
            return
        assert pool == f"pool {self.pools}"
        graph.pool = pool
        with _Recording(graph):
            yield
        graph.forget_results()
        self.graphs.append(graph)


def with_stand_in(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let passes be recorded on the CPU."""
    recorder = Recorder()
    for name, value in (
        ("CUDAGraph", StandIn),
        ("graph", recorder.record),
        ("graph_pool_handle", recorder.new_pool),
        ("Stream", lambda device: "a stream"),
        ("stream", lambda stream: nullcontext()),
        ("synchronize", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(deepspeed_engine, "has_graphs", lambda device_type: True)
    return recorder
