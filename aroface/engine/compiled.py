"""`torch.compile` for the backbone, and what it shares with graphs: made before the first step, given up on failure.

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


def warm_up(rehearse: Callable[[], None], give_up: Callable[[], None], *, settings: str, is_told: bool) -> bool:
    """Compile, or record graphs, by a rehearsal of one step; on failure go back to eager, on all ranks, and say why.

    Args:
        rehearse: runs every pass of a step through the network, forward and backward, and leaves no trace.
        give_up: makes the network run as it is.
        settings: what asked for this, such as `engine.compile`.
        is_told: whether this rank says that the user has to wait.

    Returns:
        Whether the network is compiled or recorded. A collective.
    """
    if is_told:
        wait = "about one to five minutes" if "compile" in settings else "some seconds"
        logger.info("Preparing the network (%s); the first step starts in %s.", settings, wait)
    started, reason = time.perf_counter(), ""
    try:
        rehearse()
    except Exception as error:  # the compiler raises of every kind
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if any_rank(bool(reason)):
        give_up()
        if reason:
            logger.warning(
                "The network runs as it is, slower, for %s failed: %s. On a CPU the compiler needs g++; %s: false "
                "silences this.",
                settings,
                reason,
                settings,
            )
        elif is_told:
            logger.warning("On another rank %s failed; the network runs as it is on all ranks.", settings)
        return False
    if is_told:
        logger.info("Prepared in %.0f s.", time.perf_counter() - started)
    return True


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Buffers and the global random state are afterwards what they were before."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
