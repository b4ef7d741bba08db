"""The four ways to start a job. Each can name its commands, check the nodes, and run to the end."""

import argparse
import logging
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from aroface.config import TrainConfig, load_config
from aroface.errors import ConfigError
from launch.cluster.commands import (
    Command,
    SshOptions,
    deepspeed_over_ssh,
    node_command,
    preflight_arguments,
    preflight_over_slurm,
    slurm_command,
)
from launch.cluster.hosts import Host, choose_hosts, read_hostfile
from launch.cluster.job import Job, check_job, environment_prefix
from launch.cluster.over_ssh import Answer, run_everywhere, ssh_words
from launch.cluster.preflight import PreflightError
from launch.cluster.stop import signal_ranks
from launch.cluster.supervise import supervise

__all__ = ["Launcher", "choose_launcher"]

logger = logging.getLogger(__name__)

_FORWARDED = ("NCCL_", "GLOO_")
_STOP_TIMEOUT_S = 30.0


class Launcher(Protocol):
    """One way to start a job."""

    def commands(self) -> list[tuple[str, Command]]:
        """What would run, each with a word on where."""
        ...

    def preflight(self) -> None:
        """Check every node; raises PreflightError."""
        ...

    def start(self) -> int:
        """Run to the end; returns the exit code."""
        ...


class SshLauncher:
    """DeepSpeed's launcher through pdsh and ssh, from one machine."""

    def __init__(self, job: Job, hostfile: Path, ssh: SshOptions, timeout_s: int) -> None:
        self._job, self._ssh, self._timeout_s = job, ssh, timeout_s
        self._command = deepspeed_over_ssh(job, hostfile, ssh)

    def commands(self) -> list[tuple[str, Command]]:
        """The check of each node, then the one command of the training."""
        checks = [
            (f"check, for {host}", Command(tuple(ssh_words(host, words, self._ssh)))) for host, words in self._checks()
        ]
        return [*checks, ("training, once", self._command)]

    def preflight(self) -> None:
        """Run the check on all nodes through ssh."""
        for program, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
            if shutil.which(program) is None:
                raise PreflightError(
                    f"{program} is not installed here; apt-get install {package}, or start the job on every node with "
                    "--launcher no-ssh."
                )
        limit = self._timeout_s + self._ssh.connect_timeout_s + 30  # Python and torch have to start as well
        answers = run_everywhere(self._checks(), self._ssh, timeout_s=limit, stop_at_first_failure=True)
        _judge(answers)
        logger.info("%s", answers[0].output)

    def start(self) -> int:
        """Start, and see that no node stays behind."""
        return supervise(self._command, stop=lambda: self._signal(False), end=lambda: self._signal(True))

    def _checks(self) -> list[tuple[str, list[str]]]:
        module = [*environment_prefix(self._job), self._job.python, "-m", "launch.cluster.preflight"]
        return [
            (host.name, [*module, *preflight_arguments(self._job, rank, timeout_s=self._timeout_s)])
            for rank, host in enumerate(self._job.hosts)
        ]

    def _signal(self, kill: bool) -> None:
        words = [self._job.python, "-m", "launch.cluster.stop", self._job.token, *(["--kill"] if kill else [])]
        everywhere = [(host.name, words) for host in self._job.hosts]
        run_everywhere(everywhere, self._ssh, timeout_s=_STOP_TIMEOUT_S, stop_at_first_failure=False)


def _judge(answers: Sequence[Answer]) -> None:
    """Raise what went wrong: hosts that were not reached, else what the nodes said."""
    lines = [
        f"{answer.host} cannot be reached by ssh: {_last_line(answer)}. Try `ssh {answer.host} hostname`, correct the "
        "hostfile, or take the host out of it."
        for answer in answers
        if answer.is_unreachable
    ]
    failed = [answer for answer in answers if answer.code and not answer.is_unreachable]
    told = [line for answer in failed for line in answer.output.splitlines() if line.startswith(("preflight:", "  "))]
    lines += list(dict.fromkeys(told)) or [f"{answer.host}: {_last_line(answer)}" for answer in failed]
    silent = [answer.host for answer in answers if answer.code is None]
    if not lines and silent:
        lines = [f"no answer from {', '.join(silent)} in time; is the machine overloaded, or a file system hanging?"]
    if lines:
        raise PreflightError("Nothing was started.\n" + "\n".join(lines))


def _last_line(answer: Answer) -> str:
    return (answer.output.splitlines() or ["it said nothing"])[-1].rstrip(".")


class NodeLauncher:
    """DeepSpeed's or PyTorch's launcher for the ranks of this node; started on every node."""

    def __init__(self, job: Job, launcher: str, hostfile: Path | None, node_rank: int | None, timeout_s: int) -> None:
        self._job, self._launcher, self._hostfile = job, launcher, hostfile
        self._node_rank, self._timeout_s = node_rank, timeout_s

    def commands(self) -> list[tuple[str, Command]]:
        """The check and the training of every node."""
        return [
            (f"{what}, on {host.label(rank)}", command)
            for rank, host in enumerate(self._job.hosts)
            for what, command in (
                ("check", self._check(rank)),
                ("training", node_command(self._job, self._launcher, self._hostfile, rank)),
            )
        ]

    def preflight(self) -> None:
        """Meet the other nodes; in a process of its own, whose memory is free again before the training."""
        if subprocess.run(self._check(self._rank()).words, check=False).returncode:
            raise PreflightError("Nothing was started; see the lines above.")

    def _check(self, rank: int) -> Command:
        words = [*environment_prefix(self._job), self._job.python, "-m", "launch.cluster.preflight"]
        return Command((*words, *preflight_arguments(self._job, rank, timeout_s=self._timeout_s)))

    def start(self) -> int:
        """Start the ranks of this node."""
        command = node_command(self._job, self._launcher, self._hostfile, self._rank())
        token = self._job.token
        return supervise(
            command,
            stop=lambda: signal_ranks(token, signal.SIGTERM),
            end=lambda: signal_ranks(token, signal.SIGKILL),
        )

    def _rank(self) -> int:
        nodes = len(self._job.hosts)
        if self._node_rank is None or not 0 <= self._node_rank < nodes:
            raise ConfigError(
                f"--node-rank {self._node_rank} does not name one of {nodes} node(s); give each node its own, from 0 "
                f"to {nodes - 1}."
            )
        return self._node_rank


class SlurmLauncher:
    """srun, inside an allocation."""

    def __init__(self, job: Job, timeout_s: int, slurm_job: str) -> None:
        self._job, self._timeout_s, self._slurm_job = job, timeout_s, slurm_job

    def commands(self) -> list[tuple[str, Command]]:
        """The check and the training."""
        check = preflight_over_slurm(self._job, timeout_s=self._timeout_s)
        return [("check, inside the allocation", check), ("training, inside the allocation", slurm_command(self._job))]

    def preflight(self) -> None:
        """Run the check as a job step."""
        words = preflight_over_slurm(self._job, timeout_s=self._timeout_s).words
        try:
            result = subprocess.run(words, timeout=self._timeout_s + 60, check=False)
        except subprocess.TimeoutExpired as error:
            raise PreflightError("The check of the nodes did not end in time; nothing was started.") from error
        if result.returncode:
            raise PreflightError("Nothing was started; see the lines above.")

    def start(self) -> int:
        """Start the ranks; stopping goes through scancel, because srun ends its tasks when it is signalled itself."""
        return supervise(
            slurm_command(self._job), stop=lambda: self._scancel("TERM"), end=lambda: self._scancel("KILL")
        )

    def _scancel(self, name: str) -> None:
        # Without --batch the signal goes to the steps of the job and not to its script.
        words = ["scancel", f"--signal={name}", self._slurm_job]
        subprocess.run(words, timeout=_STOP_TIMEOUT_S, check=False, stderr=subprocess.DEVNULL)


def choose_launcher(args: argparse.Namespace, environment: Mapping[str, str]) -> Launcher:
    """The launcher that the options of `aroface launch` and the surroundings ask for.

    Raises:
        ArofaceError: options that do not go together, hosts or batch sizes that do not fit.
    """
    kind = args.launcher or _default_launcher(args, environment)
    hosts = _hosts(args, kind, environment)
    job = Job(
        config=args.config,
        overrides=tuple(args.overrides),
        run=args.run,
        hosts=hosts,
        master_addr=args.master_addr or hosts[0].name,
        master_port=args.master_port,
        token=uuid4().hex[:12],
        options=() if args.resume is None else ("--resume", args.resume),
        environment=_environment(args.env, environment, is_remote=kind == "ssh"),
    )
    check_job(job, load_config(args.config, TrainConfig, args.overrides))
    match kind:
        case "ssh":
            ssh = SshOptions(args.ssh_port, args.ssh_config)
            return SshLauncher(job, _hostfile(args, kind), ssh, args.timeout)
        case "slurm":
            return SlurmLauncher(job, args.timeout, environment["SLURM_JOB_ID"])
        case _:
            hostfile = _hostfile(args, kind) if kind == "no-ssh" else None
            rank = 0 if args.node_rank is None and len(hosts) == 1 else args.node_rank
            return NodeLauncher(job, kind, hostfile, rank, args.timeout)


def _default_launcher(args: argparse.Namespace, environment: Mapping[str, str]) -> str:
    if args.hostfile is not None:
        return "ssh"
    return "slurm" if "SLURM_JOB_ID" in environment else "torchrun"


def _hostfile(args: argparse.Namespace, kind: str) -> Path:
    if args.hostfile is None:
        raise ConfigError(f"--launcher {kind} needs --hostfile F with one `HOST slots=GPUS` a line.")
    path: Path = args.hostfile
    return path


def _hosts(args: argparse.Namespace, kind: str, environment: Mapping[str, str]) -> tuple[Host, ...]:
    if kind == "slurm":
        return _slurm_hosts(args, environment)
    if args.hostfile is not None:
        return choose_hosts(read_hostfile(args.hostfile), nodes=args.nodes, gpus_per_node=args.gpus_per_node)
    nodes = 1 if args.nodes is None else args.nodes
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes} must be 1 or more.")
    if nodes > 1 and (args.master_addr is None or args.gpus_per_node is None):
        raise ConfigError(
            f"--nodes {nodes} without a hostfile needs --gpus-per-node and the --master-addr of node 0; or give "
            "--hostfile."
        )
    slots = args.gpus_per_node or _gpus_here()
    first = args.master_addr or "127.0.0.1"
    return (Host(first, slots), *([Host("", slots)] * (nodes - 1)))


def _gpus_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _slurm_hosts(args: argparse.Namespace, environment: Mapping[str, str]) -> tuple[Host, ...]:
    if "SLURM_JOB_ID" not in environment:
        raise ConfigError(
            "--launcher slurm works inside an allocation; submit launch/slurm/train.sbatch, or use salloc."
        )
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    if args.nodes not in (None, nodes):
        raise ConfigError(f"--nodes {args.nodes} does not fit the allocation, which has {nodes}; leave it out.")
    given = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_NTASKS_PER_NODE")
    if args.gpus_per_node is None and given is None:
        raise ConfigError("Slurm does not tell how many GPUs a node has; give --gpus-per-node G.")
    slots = int(args.gpus_per_node or str(given))
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        timeout=_STOP_TIMEOUT_S,
        check=True,
    )
    return tuple(Host(name, slots) for name in listed.stdout.split())


def _environment(given: Sequence[str], environment: Mapping[str, str], *, is_remote: bool) -> dict[str, str]:
    """What is set on the nodes: what was asked for, and what ssh would lose of this shell."""
    chosen = {name: value for name, value in environment.items() if is_remote and name.startswith(_FORWARDED)}
    if is_remote and "PYTHONPATH" in environment:
        chosen["PYTHONPATH"] = environment["PYTHONPATH"]
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and name not in environment:
            raise ConfigError(f"--env {name}: not set in this shell; write --env {name}=VALUE.")
        chosen[name] = value if equals else environment[name]
    return chosen
