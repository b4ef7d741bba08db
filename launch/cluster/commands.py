"""The exact commands that start a job, as lists of words; `printable` turns them into a line to paste.

ssh        once, on any machine: DeepSpeed's launcher reaches every node through pdsh and ssh
no-ssh     on every node: DeepSpeed's launcher starts the ranks of that node
torchrun   on every node: PyTorch's launcher does
slurm      once, inside an allocation: srun starts every rank itself
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aroface.errors import ConfigError
from launch.cluster.job import Job, environment_prefix, train_arguments, train_command

__all__ = [
    "Command",
    "SshOptions",
    "deepspeed_over_ssh",
    "node_command",
    "preflight_arguments",
    "preflight_over_slurm",
    "slurm_command",
]

_SHELL_SAFE = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
_SPECIAL_IN_QUOTES = re.compile(r"([\\$`])")


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what is set in its environment."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def printable(self) -> str:
        """One line for a POSIX shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])


@dataclass(frozen=True)
class SshOptions:
    """How nodes are reached. Never asks for a password, never waits for long."""

    port: int | None = None
    config: Path | None = None
    connect_timeout_s: int = 10

    def words(self) -> list[str]:
        """Options of `ssh`."""
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={self.connect_timeout_s}"]
        # A node that vanishes without a word is given up after 45 s.
        options += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]
        options += [] if self.config is None else ["-F", str(self.config.absolute())]
        return options + ([] if self.port is None else ["-p", str(self.port)])


def deepspeed_over_ssh(job: Job, hostfile: Path, ssh: SshOptions) -> Command:
    """DeepSpeed's launcher for all nodes at once; it runs pdsh.

    Raises:
        ConfigError: an argument with a percent sign, which pdsh would replace.
    """
    words = [
        *(job.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)),
        *("--num_nodes", str(len(job.hosts)), *_slots(job)),
        # Without these two DeepSpeed asks the first host through an ssh of its own that has no time limit.
        *("--no_ssh_check", "--master_addr", job.master_addr, "--master_port", str(job.master_port)),
        *("--force_multi", "--no_python", "--no_local_rank"),
    ]
    arguments = [_quoted_for_pdsh(word) for word in train_command(job)]
    return Command((*words, *arguments), {"PDSH_SSH_ARGS_APPEND": " ".join(ssh.words())})


def _slots(job: Job) -> list[str]:
    counts = {host.slots for host in job.hosts}
    return ["--num_gpus", str(counts.pop())] if len(counts) == 1 else []


def _quoted_for_pdsh(word: str) -> str:
    """The word as DeepSpeed has to be given it, so that the shell of the node reads `word`.

    DeepSpeed puts arguments with a space into double quotes and escapes the quotes in them; others it passes as they
    are. Either way a shell on the node reads the line.
    """
    if "%" in word:
        raise ConfigError(
            f"{word!r} holds a percent sign, which pdsh replaces. Rename it, or start the job on every node with "
            "--launcher no-ssh."
        )
    if " " in word:
        return _SPECIAL_IN_QUOTES.sub(r"\\\1", word)
    return word if _SHELL_SAFE.fullmatch(word) else shlex.quote(word)


def node_command(job: Job, launcher: str, hostfile: Path | None, node_rank: int) -> Command:
    """DeepSpeed's launcher (`no-ssh`) or PyTorch's (`torchrun`) for the ranks of one node."""
    master = (job.master_addr, str(job.master_port))
    if launcher == "no-ssh":
        assert hostfile is not None  # noqa: S101 - the command line insists on one
        words = [
            *(job.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)),
            *("--num_nodes", str(len(job.hosts)), *_slots(job), "--no_ssh", "--node_rank", str(node_rank)),
            *("--master_addr", master[0], "--master_port", master[1], "--no_python", "--no_local_rank"),
        ]
    else:
        words = [
            *(job.python, "-m", "torch.distributed.run", "--nnodes", str(len(job.hosts))),
            *("--nproc-per-node", str(job.hosts[node_rank].slots), "--node-rank", str(node_rank)),
            *("--master-addr", master[0], "--master-port", master[1]),
            *("--max-restarts", "0", "--no-python", "--"),  # without -- it takes --run for one of its own
        ]
    return Command((*words, *train_command(job)))


def slurm_command(job: Job) -> Command:
    """The srun that starts every rank; a rank that fails ends the others."""
    words = [*_srun(job, job.hosts[0].slots), "--kill-on-bad-exit=1", *environment_prefix(job)]
    words += [job.python, "-u", "-m", "launch.cluster.slurm_rank", job.master_addr, str(job.master_port)]
    return Command((*words, *train_arguments(job)))


def preflight_over_slurm(job: Job, *, timeout_s: int) -> Command:
    """The srun that checks every node."""
    words = [*_srun(job, 1), "--kill-on-bad-exit=1", *environment_prefix(job), job.python, "-u"]
    return Command((*words, "-m", "launch.cluster.preflight", *preflight_arguments(job, None, timeout_s=timeout_s)))


def _srun(job: Job, tasks_per_node: int) -> list[str]:
    nodes = len(job.hosts)
    tasks = ["--ntasks", str(nodes * tasks_per_node), "--ntasks-per-node", str(tasks_per_node)]
    return ["srun", "--nodes", str(nodes), *tasks, "--export=ALL"]


def preflight_arguments(job: Job, node_rank: int | None, *, timeout_s: int) -> list[str]:
    """Arguments of `python -m launch.cluster.preflight`; a None rank is read from Slurm's environment."""
    arguments = [str(job.config), *job.overrides, "--run", str(job.run)]
    arguments += ["--hosts", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
    arguments += ["--master-addr", job.master_addr, "--master-port", str(job.master_port)]
    arguments += [] if node_rank is None else ["--node-rank", str(node_rank)]
    return [*arguments, "--timeout", str(timeout_s)]
