"""The nodes of a job: a hostfile in DeepSpeed's form, or a number of nodes alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aroface.errors import ConfigError

__all__ = ["Host", "choose_hosts", "read_hostfile"]

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_EXAMPLE = "Write one `HOSTNAME slots=GPUS` a line, as in launch/hostfile.example."


@dataclass(frozen=True)
class Host:
    """One node."""

    name: str  #: host name or address; empty where only the node itself knows it
    slots: int  #: ranks that it runs, one per GPU

    def label(self, node_rank: int) -> str:
        """What messages call it."""
        return f"node {node_rank} ({self.name})" if self.name else f"node {node_rank}"


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The nodes of a hostfile, in its order; the first one is the master.

    Raises:
        ConfigError: the file is missing or empty, or a line is malformed or names a host twice; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error}. {_EXAMPLE}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise ConfigError(f"{path}, line {number}: {text!r} is not a host. {_EXAMPLE}")
        if match[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {match[1]} stands twice; add up its slots in one line.")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host. {_EXAMPLE}")
    return tuple(hosts.values())


def choose_hosts(hosts: Sequence[Host], *, nodes: int | None, gpus_per_node: int | None) -> tuple[Host, ...]:
    """The first `nodes` hosts with `gpus_per_node` ranks each; None takes all there are.

    Raises:
        ConfigError: more nodes or more ranks than the hosts have.
    """
    if nodes is not None and not 1 <= nodes <= len(hosts):
        raise ConfigError(
            f"--nodes {nodes} does not fit the hostfile, which names {len(hosts)} "
            f"({', '.join(host.name for host in hosts)}). Lower --nodes, or add hosts to the file."
        )
    chosen = tuple(hosts[:nodes])
    if gpus_per_node is None:
        return chosen
    small = [host for host in chosen if host.slots < gpus_per_node]
    if small or gpus_per_node < 1:
        found = ", ".join(f"{host.name} has slots={host.slots}" for host in small) or "it must be 1 or more"
        raise ConfigError(
            f"--gpus-per-node {gpus_per_node} does not fit the hostfile: {found}. Lower it, or correct the file."
        )
    return tuple(replace(host, slots=gpus_per_node) for host in chosen)
