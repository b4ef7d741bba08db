"""One command on every node through ssh, with an end in sight whatever the nodes do."""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.commands import SshOptions

__all__ = ["Answer", "run_everywhere", "ssh_words"]

_SSH_FAILED = 255
_POLL_S = 0.2


@dataclass(frozen=True)
class Answer:
    """What came back from one node."""

    host: str
    code: int | None  #: exit code; None when it was ended because another node had failed, or too late
    output: str

    @property
    def is_unreachable(self) -> bool:
        """Whether ssh itself failed."""
        return self.code == _SSH_FAILED


def ssh_words(host: str, words: Sequence[str], ssh: SshOptions) -> list[str]:
    """The ssh command that runs `words` on a host, in the working directory of this process."""
    path = os.environ.get("PYTHONPATH")
    setting = "" if path is None else f"PYTHONPATH={shlex.quote(path)} "
    return ["ssh", *ssh.words(), host, f"cd {shlex.quote(str(Path.cwd()))} && {setting}{shlex.join(words)}"]


def run_everywhere(
    commands: Sequence[tuple[str, Sequence[str]]], ssh: SshOptions, *, timeout_s: float, stop_at_first_failure: bool
) -> list[Answer]:
    """Run (host, words) on all hosts at once and wait for all of them, or for the first that fails.

    Args:
        commands: host and words for each.
        ssh: how to reach them.
        timeout_s: after which whatever still runs is ended.
        stop_at_first_failure: end the others one second after one has failed, so that they can still say why.
    """
    processes = [
        subprocess.Popen(
            ssh_words(host, words, ssh), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for host, words in commands
    ]
    end = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if stop_at_first_failure and any(process.poll() for process in processes):
            end = min(end, time.monotonic() + 1)
            stop_at_first_failure = False
        time.sleep(_POLL_S)
    answers = []
    for (host, _), process in zip(commands, processes, strict=True):
        code = process.poll()
        if code is None:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=5)
            answers.append(Answer(host, code, output.decode(errors="replace").strip()))
            continue
        answers.append(Answer(host, code, ""))
    return answers
