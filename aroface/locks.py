"""Locks among processes, by lock files: advisory, and freed by the system when a process ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aroface.errors import DataError

__all__ = ["LockAttempt", "NoLocksError", "try_lock"]

_HOLDER_BYTES = 200


class NoLocksError(DataError):
    """The file system has no locks."""


@dataclass(frozen=True)
class LockAttempt:
    """What came of it."""

    is_mine: bool  #: whether this process holds the lock
    holder: str  #: who does, as it has written into the file itself


@contextmanager
def try_lock(path: Path, *, wait: bool = False) -> Iterator[LockAttempt]:
    """Take the lock that the file `path` stands for, which is made where it is missing and stays.

    One that is taken in this process already counts as taken. On a network file system the lock reaches as far as the
    system's `flock` does: over all machines on NFS and most parallel file systems.

    Args:
        path: lock file, in a folder that exists.
        wait: for as long as somebody else has it; otherwise the attempt tells who has.

    Raises:
        NoLocksError: the file system has none.
        OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask: a run may be continued by a colleague
    try:
        if not _lock(descriptor, path, wait=wait):
            written = os.pread(descriptor, _HOLDER_BYTES, 0).decode(errors="replace").strip()
            yield LockAttempt(False, written or "another process")
            return
        me = f"process {os.getpid()} on {socket.gethostname()}"
        _write(descriptor, me)
        try:
            yield LockAttempt(True, me)
        finally:
            _write(descriptor, "")
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocksError(
            f"{path} cannot be locked ({error.strerror}): the file system has no locks. Write to another one."
        ) from error
    return True


def _write(descriptor: int, text: str) -> None:
    """For the person who reads a refusal; the lock holds without it, on a full disk for instance."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
