"""Locks among processes: one holder, named, gone when it is killed."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from aroface.locks import NoLocksError, try_lock

ROOT = Path(__file__).parents[3]


@contextmanager
def holder(path):
    """Another process that has the lock."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom aroface.locks import try_lock\n"
        "with try_lock(Path(sys.argv[1])) as lock:\n    print(lock.is_mine, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_holder_is_named_and_a_kill_frees_the_lock(tmp_path):
    path = tmp_path / "lock"
    with holder(path) as process:
        with try_lock(path) as lock:
            assert (lock.is_mine, lock.holder) == (False, f"process {process.pid} on {socket.gethostname()}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with try_lock(path) as lock:
            assert (lock.is_mine, lock.holder) == (True, f"process {os.getpid()} on {socket.gethostname()}")
    assert path.read_text() == ""


def test_one_at_a_time_in_one_process_too_and_free_after_an_error(tmp_path):
    def fail():
        with try_lock(tmp_path / "lock") as mine, try_lock(tmp_path / "lock") as other:
            assert (mine.is_mine, other.is_mine) == (True, False)
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()


def test_waiting_takes_turns(tmp_path):
    counts = []

    def work():
        with try_lock(tmp_path / "lock", wait=True) as lock:
            counts.append(len(counts))
            assert lock.is_mine

    with try_lock(tmp_path / "lock"):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert counts == []
    for thread in threads:
        thread.join()
    assert counts == [0, 1, 2]


def test_a_file_system_without_locks_is_told_apart(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(NoLocksError, match="has no locks. Write to another one"), try_lock(tmp_path / "lock"):
        pass


def test_a_name_that_cannot_be_written_does_not_keep_from_locking(tmp_path, monkeypatch):
    def is_full(descriptor, text, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", is_full)
    with try_lock(tmp_path / "lock") as mine, try_lock(tmp_path / "lock") as other:
        assert mine.is_mine
        assert (other.is_mine, other.holder) == (False, "another process")
