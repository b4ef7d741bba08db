"""What one node finds out about itself before a job, and what the reports of all nodes have to agree on."""

import hashlib
import json
import os
import shutil
import socket
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from aroface.config import TrainConfig, dump_config, load_config
from aroface.errors import ArofaceError

__all__ = ["NodeReport", "disagreements", "examine_node"]

_ADVICE = {
    "commit": "check out the same commit",
    "device": "look why PyTorch finds no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES), or take that node out",
}


@dataclass(frozen=True)
class NodeReport:
    """The findings of one node; whatever could not be found out stands in `problems`."""

    node_rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)  #: python, packages, commit, kind of device
    config_sha256: str = ""
    data_sha256: str = ""  #: fingerprint of the manifest
    num_classes: int = 0
    problems: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        """Back from JSON."""
        return cls(**json.loads(text))


def examine_node(
    config_path: Path,
    overrides: Sequence[str],
    run: Path,
    *,
    node_rank: int,
    slots: Sequence[int],
    names: Sequence[str],
) -> NodeReport:
    """Look at this node; never raises for what is wrong with it.

    Args:
        config_path: the configuration, as this node sees it.
        overrides: `key.path=value`.
        run: run directory.
        node_rank: of this node.
        slots: ranks of every node.
        names: hosts that have to resolve.
    """
    host, problems = socket.gethostname(), _unresolved(names)
    versions = _versions(problems)
    _check_devices(slots[node_rank], problems)
    try:
        config = load_config(config_path, TrainConfig, overrides)
    except ArofaceError as error:
        return NodeReport(node_rank, host, versions, problems=[*problems, str(error)])
    data_sha256, num_classes = _open_data(config, problems)
    ranks = sum(slots)
    if 0 < num_classes < ranks:
        problems.append(f"{num_classes} classes cannot be shared out over {ranks} ranks; use fewer ranks")
    _check_disk(run, config, num_classes, problems)
    digest = hashlib.sha256(dump_config(config).encode()).hexdigest()
    return NodeReport(node_rank, host, versions, digest, data_sha256, num_classes, problems)


def _unresolved(names: Sequence[str]) -> list[str]:
    problems = []
    for name in dict.fromkeys(names):
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            problems.append(f"the host {name} does not resolve here ({error}); add it to DNS or /etc/hosts")
    return problems


def _versions(problems: list[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    from aroface.engine.checkpoint import git_commit, versions

    try:
        return {**versions(), "commit": git_commit(), "device": _device()}
    except PackageNotFoundError as error:
        problems.append(f"the package {error.name} is not installed; run make setup on this node")
        return {}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_devices(slots: int, problems: list[str]) -> None:
    import torch

    found = torch.cuda.device_count()
    if 0 < found < slots:
        problems.append(f"{slots} ranks are to run here, but PyTorch sees {found} GPU(s); correct the slots")


def _open_data(config: TrainConfig, problems: list[str]) -> tuple[str, int]:
    """Fingerprint and classes of the training set: every index read, every tar's length compared."""
    from launch.training_data import open_training_data

    try:
        data = open_training_data(config.data, image_size=config.model.image_size)
    except ArofaceError as error:
        problems.append(str(error))
        return "", 0
    return data.fingerprint, data.num_classes


def _check_disk(run: Path, config: TrainConfig, num_classes: int, problems: list[str]) -> None:
    """Room for the checkpoints that are kept and the one being written."""
    import torch

    from aroface.models import build_backbone

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_backbone(config.model).parameters())
    one = 8 * (parameters + num_classes * config.model.embedding_dim)  # fp32 weights and momentum
    needed = one * (config.checkpoint.keep_last + 1)
    there = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        problems.append(f"the run directory {run} cannot be written to; choose another --run, or its permissions")
    free = shutil.disk_usage(there).free
    if free < needed:
        problems.append(
            f"{free / 2**30:.2f} GiB are free for {run}, and {config.checkpoint.keep_last + 1} checkpoints take "
            f"{needed / 2**30:.2f} GiB; free some, lower checkpoint.keep_last, or choose another --run"
        )


def disagreements(reports: Sequence[NodeReport]) -> list[str]:
    """Everything that keeps the job from starting, each with the nodes it is about; empty when all is well."""
    found = [f"{_name(report)}: {problem}" for report in reports for problem in report.problems]
    keys = sorted({key for report in reports for key in report.versions})
    for key in keys:
        advice = _ADVICE.get(key, "install the same version")
        found += _different(reports, key, [report.versions.get(key, "") for report in reports], advice)
    found += _different(
        reports,
        "configuration",
        [report.config_sha256[:12] for report in reports],
        "give every node the same file and the same overrides",
    )
    found += _different(
        reports,
        "manifest of the shards",
        [report.data_sha256[:12] for report in reports],
        "copy the shards again from one node, or use a shared directory",
    )
    return found


def _name(report: NodeReport) -> str:
    return f"node {report.node_rank} ({report.host})"


def _different(reports: Sequence[NodeReport], what: str, values: Sequence[str], advice: str) -> list[str]:
    """One line when the values differ; what a node could not find out is its own problem, told already."""
    nodes: dict[str, list[str]] = defaultdict(list)
    for report, value in zip(reports, values, strict=True):
        if value:
            nodes[value].append(_name(report))
    if len(nodes) < 2:
        return []
    return [
        f"{what} differs: "
        + "; ".join(f"{value} on {', '.join(names)}" for value, names in nodes.items())
        + f". To mend it, {advice}."
    ]
