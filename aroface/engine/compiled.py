"""`torch.compile` for the backbone: compiled before the first step, and given up where the compiler fails.

The module is compiled in place, so parameters keep their names and the passes that bypass DeepSpeed (attack,
consistency) run the same code as the main pass. Every kind of pass is a graph of its own with one fixed shape.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from aroface.distributed import any_rank

__all__ = ["compile_in_place", "untouched", "warm_up"]

logger = logging.getLogger(__name__)


def compile_in_place(module: nn.Module) -> None:
    """Let the next calls of `module` run compiled; nothing is compiled yet."""
    module.compile(dynamic=False)


def warm_up(module: nn.Module, rehearse: Callable[[], None], *, is_told: bool) -> bool:
    """Compile by a rehearsal of one step; on failure go back to eager, on all ranks, and say why.

    Args:
        module: of `compile_in_place`.
        rehearse: runs every pass of a step through `module`, forward and backward, and leaves no trace.
        is_told: whether this rank says that the user has to wait.

    Returns:
        Whether the module runs compiled. A collective.
    """
    if is_told:
        logger.info("Compiling the network (engine.compile); the first step starts in about one to five minutes.")
    started, reason = time.perf_counter(), ""
    try:
        rehearse()
    except Exception as error:  # the compiler raises of every kind
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if any_rank(bool(reason)):
        module._compiled_call_impl = None
        if reason:
            logger.warning(
                "The network could not be compiled and runs as it is, slower: %s. On a CPU "
                "the compiler needs g++; engine.compile: false silences this.",
                reason,
            )
        elif is_told:
            logger.warning("Another rank could not compile the network; it runs as it is on all ranks.")
        return False
    if is_told:
        logger.info("Compiled in %.0f s.", time.perf_counter() - started)
    return True


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Buffers and the global random state are afterwards what they were before."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    weights = [parameter for module in modules for parameter in module.parameters()]
    gpus = {tensor.device.index for tensor in weights if tensor.is_cuda}  # not those of other ranks
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
