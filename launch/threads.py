"""How many threads a command should take on a machine that others may be using."""

import os
import time
from pathlib import Path

__all__ = ["free_cores"]

_SAMPLE_S = 0.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def free_cores() -> int:
    """Cores that were idle during the last half second, at least 1 and at most those this process may use.

    A thread too many is worse than one too few: OpenMP's threads wait for the slowest at every layer, and beside a busy
    neighbour two of them have been seen to run at a quarter of the speed of one.
    """
    available = len(os.sched_getaffinity(0))
    before = _idle_ticks()
    if before is None:
        return available
    time.sleep(_SAMPLE_S)
    after = _idle_ticks()
    idle = ((after or before) - before) / (_TICKS_PER_S * _SAMPLE_S)
    return max(1, min(available, round(idle)))


def _idle_ticks() -> int | None:
    """Idle time of all cores so far, in clock ticks; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    except OSError:
        return None
    return int(fields[4]) + int(fields[5])
