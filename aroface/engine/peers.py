"""What it means that another rank is gone, for the person who has to start the job again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from aroface.distributed import peer_failure, rank
from aroface.errors import ArofaceError, ConfigError

__all__ = ["LostRanksError", "lost_while_training", "start_up_faults"]


class LostRanksError(ArofaceError):
    """Another rank is gone or does not answer."""


def lost_while_training(error: RuntimeError, step: int, timeout_s: float) -> LostRanksError:
    """The message for a failed collective after `step` steps."""
    return LostRanksError(
        f"Rank {rank()} lost the other ranks after step {step} ({_reason(error)}). One of them ended, or "
        f"did not answer for engine.timeout_s = {timeout_s:g} s; look at its own messages. The "
        "newest checkpoint is good: give the same command again to continue."
    )


@contextmanager
def start_up_faults() -> Iterator[None]:
    """The same before the first step, where the master's port may be taken as well; also a decorator.

    Raises:
        LostRanksError: in the place of a failed collective.
        ConfigError: in the place of a port that is in use.
    """
    try:
        yield
    except RuntimeError as error:
        if not peer_failure(error):
            raise
        reason = _reason(error)
        if "EADDRINUSE" in reason or "address already in use" in reason:
            raise ConfigError(
                f"Port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')} is in use ({reason}). Set "
                "MASTER_PORT (aroface launch: --master-port) to another one, or end what listens there."
            ) from error
        raise LostRanksError(
            f"Rank {rank()} did not find the other ranks, or lost them, before the first step ({reason}). One of them "
            "ended or was not started; look at its own messages, and start all of them again."
        ) from error


def _reason(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200]
