"""Run a launcher until it ends; a signal becomes a clean stop of the ranks, a second one or a delay an end."""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from types import FrameType

from launch.cluster.commands import Command

__all__ = ["supervise"]

logger = logging.getLogger(__name__)

_POLL_S = 0.2
#: Between the request to stop and the end by force: a step and a checkpoint have to fit.
_GRACE_S = 300.0


def supervise(command: Command, *, stop: Callable[[], None], end: Callable[[], None], grace_s: float = _GRACE_S) -> int:
    """Run a command in a session of its own; returns its exit code.

    Args:
        command: the launcher.
        stop: asks all ranks to save and finish; called on the first SIGTERM or SIGINT.
        end: ends all ranks at once; called on the second one, after `grace_s`, and when the launcher has failed, so
            that no node goes on alone.
        grace_s: see `end`.
    """
    signals = 0

    def count(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1

    with _handlers(count):
        process = subprocess.Popen(command.words, env=os.environ | dict(command.environment), start_new_session=True)
        asked_at: float | None = None
        while (code := process.poll()) is None:
            if signals and asked_at is None:
                logger.info("Stopping: the ranks finish their step and save. A second signal ends them at once.")
                asked_at = time.monotonic()
                stop()
            if asked_at is not None and (signals > 1 or time.monotonic() > asked_at + grace_s):
                end()
                _end_session(process)
                code = process.wait()
                break
            time.sleep(_POLL_S)
    if code:
        end()
        _end_session(process)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the launcher and its children; its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
