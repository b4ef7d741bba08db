"""What is started on the nodes: one `aroface train` per rank, with the same arguments everywhere."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aroface.config import TrainConfig
from aroface.engine.schedule import check_share
from aroface.errors import ConfigError
from launch.cluster.hosts import Host

__all__ = ["JOB_VARIABLE", "Job", "check_job", "environment_prefix", "train_arguments", "train_command"]

#: Environment variable that marks every rank of a job, so that they can be found and stopped.
JOB_VARIABLE = "AROFACE_JOB"
_PORTS = range(1024, 65536)


@dataclass(frozen=True)
class Job:
    """One training over nodes."""

    config: Path
    overrides: tuple[str, ...]
    run: Path
    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    token: str  #: value of `JOB_VARIABLE`
    options: tuple[str, ...] = ()  #: of `aroface train`, such as --resume never
    environment: Mapping[str, str] = field(default_factory=dict)  #: set on every node
    python: str = sys.executable

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return sum(host.slots for host in self.hosts)


def check_job(job: Job, config: TrainConfig) -> None:
    """Refuse what cannot run, before any node is asked.

    Raises:
        ConfigError: batch sizes that do not multiply out over the ranks, a share of them that is too small to be
            attacked, or a port that is none.
    """
    if job.master_port not in _PORTS:
        raise ConfigError(
            f"--master-port {job.master_port} is not a free port's number; choose one from {_PORTS.start} to "
            f"{_PORTS.stop - 1}."
        )
    try:
        check_share(config, job.world_size)
    except ConfigError as error:
        slots = " + ".join(str(host.slots) for host in job.hosts)
        raise ConfigError(f"{error} The ranks are those of {len(job.hosts)} node(s): {slots}.") from error


def environment_prefix(job: Job) -> list[str]:
    """The words `env NAME=VALUE ...` in front of a command on a node."""
    return ["env", f"{JOB_VARIABLE}={job.token}", *(f"{name}={value}" for name, value in job.environment.items())]


def train_arguments(job: Job) -> list[str]:
    """What stands behind `aroface`, the same for every rank."""
    return ["train", str(job.config), *job.overrides, "--run", str(job.run), *job.options]


def train_command(job: Job) -> list[str]:
    """`aroface train` as one rank runs it, the environment included."""
    return [*environment_prefix(job), job.python, "-u", "-m", "launch", *train_arguments(job)]
