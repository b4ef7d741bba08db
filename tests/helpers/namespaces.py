"""Two nodes on one machine: network namespaces with an address each, joined by a virtual cable."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.needs import missing


@dataclass(frozen=True)
class Node:
    """One namespace; its interface is called eth0."""

    name: str
    address: str

    def words(self, *command: str) -> list[str]:
        """The command, to be run on this node."""
        return ["ip", "netns", "exec", self.name, *command]

    def processes(self) -> list[int]:
        """Everything that runs on this node."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(line) for line in listed.stdout.split()]

    def kill(self) -> None:
        """Every process on this node dies at once, as if its power were cut."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Inside, the cable is out: packets vanish without an error."""
        _ip("-n", self.name, "link", "set", "eth0", "down")
        try:
            yield
        finally:
            _ip("-n", self.name, "link", "set", "eth0", "up")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make them, and remove them with all that runs on them; `missing` where that is not permitted."""
    if shutil.which("ip") is None:
        missing("needs `ip` of iproute2")
    nodes = tuple(Node(f"aroface-{os.getpid()}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    made = subprocess.run(["ip", "netns", "add", nodes[0].name], capture_output=True, text=True, check=False)
    if made.returncode:
        missing(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        _ip("netns", "add", nodes[1].name)
        _ip(
            "-n",
            nodes[0].name,
            *(["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns"]),
            nodes[1].name,
        )
        for node in nodes:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", node.name, "link", "set", device, "up")
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            if Path("/run/netns", node.name).exists():
                node.kill()
                _ip("netns", "delete", node.name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
