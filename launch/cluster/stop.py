"""Signal the ranks of one job on this node: `python -m launch.cluster.stop TOKEN [--kill]`.

The ranks are found by the mark in their environment, so nothing else is ever touched. Without --kill they finish their
step, save, and end with 0, and the launchers above them end by themselves.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.job import JOB_VARIABLE

__all__ = ["main", "ranks_of", "signal_ranks"]


def ranks_of(token: str) -> list[int]:
    """Process ids on this node that carry the mark and have a RANK: the ranks, not what they were started by."""
    mark = f"{JOB_VARIABLE}={token}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            variables = path.read_bytes().split(b"\0")
            if mark in variables and any(text.startswith(b"RANK=") for text in variables):
                found.append(int(path.parent.name))
    return found


def signal_ranks(token: str, number: signal.Signals) -> None:
    """Send a signal to every rank of the job on this node."""
    for process in ranks_of(token):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Signal and return 0."""
    parser = argparse.ArgumentParser(prog="python -m launch.cluster.stop", description=__doc__)
    parser.add_argument("token", help="value of " + JOB_VARIABLE)
    parser.add_argument("--kill", action="store_true", help="end them at once")
    args = parser.parse_args(argv)
    signal_ranks(args.token, signal.SIGKILL if args.kill else signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
