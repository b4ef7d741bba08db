"""The check before a job, run once on every node: `python -m launch.cluster.preflight`.

The nodes meet at the address and port that the training will use, which shows that the port is free, that the master
can be reached, and that the run directory is one and the same. Each hands in what it found out; each reads all of it
and comes to the same verdict. Exit code 0: the job may start; 2: it must not, with the reasons.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from aroface.errors import ArofaceError
from launch.cluster.hosts import Host
from launch.cluster.node_report import NodeReport, disagreements, examine_node

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

__all__ = ["PreflightError", "main", "preflight"]

_MARKER_WAIT_S = 10.0


class PreflightError(ArofaceError):
    """The nodes do not agree, or not all of them are there."""


def preflight(
    config: Path,
    overrides: Sequence[str],
    run: Path,
    *,
    hosts: Sequence[Host],
    node_rank: int,
    master_addr: str,
    master_port: int,
    timeout_s: float,
) -> list[NodeReport]:
    """Meet the other nodes and compare; returns the reports of all nodes.

    Raises:
        PreflightError: with one line for every fault, the same on all nodes that could be reached.
    """
    store = _meet(len(hosts), node_rank, master_addr, master_port, timeout_s)
    marker = _marker(run, store, node_rank)
    try:
        report = examine_node(
            config,
            overrides,
            run,
            node_rank=node_rank,
            slots=[host.slots for host in hosts],
            names=[master_addr, *(host.name for host in hosts if host.name)],
        )
        if not _appears(marker):
            report.problems.append(
                f"{run} is not the directory that node 0 sees; --run has to lie on storage that all nodes share"
            )
        store.set(f"report/{node_rank}", report.dump())
        reports = _collect(store, hosts, timeout_s)
        _part(store, len(hosts), node_rank)
    finally:
        if node_rank == 0:
            marker.unlink(missing_ok=True)
    if problems := disagreements(reports):
        raise PreflightError("The nodes are not ready; nothing was started.\n  " + "\n  ".join(problems))
    return reports


def _meet(nodes: int, node_rank: int, master_addr: str, port: int, timeout_s: float) -> "TCPStore":
    if node_rank == 0:
        _check_port(port)
    from torch._C._distributed_c10d import TCPStore

    try:
        return TCPStore(
            master_addr,
            port,
            world_size=nodes,
            is_master=node_rank == 0,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:  # torch raises several kinds, all of them RuntimeErrors
        raise PreflightError(
            f"Node {node_rank} ({socket.gethostname()}) does not reach the master at {master_addr}:{port} within "
            f"{timeout_s:g} s: {str(error).splitlines()[0][:200]}. Is node 0 started, is --master-addr an address of "
            "it, and does its firewall let the port through?"
        ) from error


def _check_port(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise PreflightError(
                f"Port {port} of node 0 ({socket.gethostname()}) is in use ({error.strerror}). Choose another "
                "--master-port, or end what listens there."
            ) from error


def _marker(run: Path, store: "TCPStore", node_rank: int) -> Path:
    """A file beside the run directory that node 0 makes and the others look for."""
    run = run.absolute()
    if node_rank == 0:
        folder = run if run.is_mount() else run.parent
        marker = folder / f".{run.name}.preflight-{uuid4().hex[:12]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            store.set("marker", "")
            raise PreflightError(
                f"Node 0 ({socket.gethostname()}) cannot write beside {run}: {error}. Choose another --run."
            ) from error
        store.set("marker", marker.name)
        return marker
    try:
        name = store.get("marker").decode()
    except RuntimeError as error:
        raise PreflightError(
            f"Port {store.port} of the master answers, but not as node 0 of this job; choose another --master-port."
        ) from error
    if not name:
        raise PreflightError(f"Node 0 cannot write beside {run}; see its message.")
    return (run if run.is_mount() else run.parent) / name


def _appears(marker: Path) -> bool:
    """Whether the file is seen here; network file systems may take a few seconds."""
    end = time.monotonic() + _MARKER_WAIT_S
    while not marker.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _collect(store: "TCPStore", hosts: Sequence[Host], timeout_s: float) -> list[NodeReport]:
    reports: list[NodeReport] = []
    missing: list[str] = []
    for rank, host in enumerate(hosts):
        wait = timedelta(seconds=1 if missing else timeout_s)
        try:
            store.wait([f"report/{rank}"], wait)
        except RuntimeError:
            missing.append(host.label(rank))
            continue
        reports.append(NodeReport.load(store.get(f"report/{rank}").decode()))
    if missing:
        raise PreflightError(
            f"No word from {', '.join(missing)} within {timeout_s:g} s; nothing was started. Start the job there too, "
            "or look at what it said."
        )
    return reports


def _part(store: "TCPStore", nodes: int, node_rank: int) -> None:
    """The master leaves last: the others are still reading from it."""
    if store.add("read", 1) == nodes:
        store.set("parted", "1")
    if node_rank == 0:
        try:
            store.wait(["parted"], timedelta(seconds=10))
        except RuntimeError:
            return  # a node died after its report; the training would find out as well


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check on this node; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.cluster.preflight", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument(
        "--hosts", required=True, help="NAME:RANKS,NAME:RANKS,... in the order of the nodes; a NAME may be empty"
    )
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--node-rank", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds")
    args = parser.parse_args(argv)
    pairs = [text.rpartition(":") for text in args.hosts.split(",")]
    hosts = [Host(name, int(slots)) for name, _, slots in pairs]
    try:
        reports = preflight(
            args.config,
            args.overrides,
            args.run,
            hosts=hosts,
            node_rank=args.node_rank,
            master_addr=args.master_addr,
            master_port=args.master_port,
            timeout_s=args.timeout,
        )
    except ArofaceError as error:
        sys.stderr.write(f"preflight: {error}\n")
        return 2
    if args.node_rank == 0:
        names = ", ".join(f"{report.host} ({host.slots})" for report, host in zip(reports, hosts, strict=True))
        sys.stderr.write(f"preflight: {len(reports)} node(s) ready: {names}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
