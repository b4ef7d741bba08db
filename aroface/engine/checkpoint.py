"""The state of a run into the canonical layout and back, at any number of ranks."""

import importlib.metadata
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aroface import __version__
from aroface.config.schema import TrainConfig
from aroface.distributed import barrier
from aroface.engine.checkpoint_layout import (
    BACKBONE_FILE,
    FORMAT_VERSION,
    OPTIMIZER_FILE,
    finish_checkpoint,
    head_file,
    prune,
    read_state,
    read_training_state,
    resolve_checkpoint,
    start_checkpoint,
    step_directory,
    task_file,
    write_state,
)
from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.engine.task import contract_of
from aroface.errors import CheckpointError, ConfigError
from aroface.heads import HeadSGD, ShardedHead

__all__ = [
    "RunPosition",
    "initial_checkpoint",
    "load_backbone",
    "load_head",
    "load_task_state",
    "load_weights",
    "restore_optimizers",
    "save_checkpoint",
    "versions",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPosition:
    """How far a run is; the whole of its data, attack and sampling state follows from it."""

    step: int  #: optimiser steps taken
    samples_seen: int  #: images over all ranks, the stream position of the next one


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    installed = {name: importlib.metadata.version(name) for name in ("deepspeed", "numpy", "safetensors")}
    return {
        "aroface": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **installed,
    }


def git_commit() -> str:
    """Commit of the code, `-dirty` when changed, `unknown` outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def save_checkpoint(
    run: Path,
    position: RunPosition,
    *,
    config: TrainConfig,
    engine: BackboneEngine,
    head: ShardedHead,
    head_optimizer: HeadSGD,
    fingerprint: str,
    task_state: Mapping[str, Tensor],
) -> Path:
    """Write one checkpoint; a collective. Returns its directory.

    `task_state` is what the task of this rank carries into its next step (`FaceTask.state_tensors`).
    """
    temporary = run / f".step-{position.step:08d}.tmp"
    if head.rank == 0:
        start_checkpoint(run, position.step)
    barrier()
    weights, momentum = engine.weights(), engine.momentum()
    _save_head(temporary / head_file(head.rank, head.world_size), head, head_optimizer)
    if task_state:
        save_file(dict(task_state), temporary / task_file(head.rank, head.world_size))
    barrier()
    if head.rank == 0:
        save_file(weights, temporary / BACKBONE_FILE)
        save_file(momentum, temporary / OPTIMIZER_FILE)
        write_state(temporary, _state(position, config, head, fingerprint))
        finish_checkpoint(temporary, run, position.step)
        prune(run, keep_last=config.checkpoint.keep_last)
    barrier()
    return step_directory(run, position.step)


def _state(position: RunPosition, config: TrainConfig, head: ShardedHead, fingerprint: str) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": position.step,
        "samples_seen": position.samples_seen,
        "config": config.model_dump(mode="json"),
        "contract": contract_of(config).model_dump(mode="json"),
        "num_classes": head.num_classes,
        "dataset_fingerprint": fingerprint,
        "rng": {"seed": config.seed, "rule": "derived from (seed, purpose, step, rank)"},
        "scaler": None,
        "world_size": head.world_size,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _save_head(path: Path, head: ShardedHead, optimizer: HeadSGD) -> None:
    tensors = {
        "weight": head.weight.detach().cpu().contiguous(),
        "momentum": optimizer.momentum_buffer.cpu().contiguous(),
        **{name: value.cpu() for name, value in head.statistics().items()},
    }
    start, stop = head.class_range
    metadata = {"class_start": str(start), "class_stop": str(stop), "num_classes": str(head.num_classes)}
    save_file(tensors, path, metadata=metadata)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def load_task_state(directory: Path, *, rank: int, world_size: int) -> dict[str, Tensor]:
    """What the task of a rank carried out of the saved step; dropped with a log line at another number of ranks."""
    path = directory / task_file(rank, world_size)
    if path.is_file():
        state: dict[str, Tensor] = load_file(path)
        return state
    if any(directory.glob("task-*.safetensors")):
        logger.info(
            "%s carries images of the delayed attack for another number of ranks; they are dropped, so the first step "
            "after this resume warps nothing.",
            directory,
        )
    return {}


def load_weights(directory: Path) -> dict[str, Tensor]:
    """State dict of the backbone."""
    weights: dict[str, Tensor] = load_file(directory / BACKBONE_FILE)
    return weights


def load_backbone(directory: Path, backbone: nn.Module) -> None:
    """Fill a backbone with the weights and batch-norm statistics of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another network.
    """
    weights = load_weights(directory)
    own = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if wrong:
        raise CheckpointError(
            f"{directory / BACKBONE_FILE} is of another network: {len(wrong)} tensors differ, the first is {wrong[0]} "
            f"with shape {saved.get(wrong[0])}, here {own.get(wrong[0])}. Set `model` as in its state.json."
        )
    backbone.load_state_dict(weights)


def initial_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that `model.init_from` names, None where a new run starts from random weights.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: its weights want other input than this run gives.
    """
    if config.model.init_from is None:
        return None
    directory = resolve_checkpoint(Path(config.model.init_from))
    theirs, ours = read_state(directory).get("contract"), contract_of(config).model_dump(mode="json")
    if theirs != ours:
        raise ConfigError(
            f"model.init_from = {config.model.init_from!r} holds weights for the input {theirs}; this run would give "
            f"them {ours}. Set data.colour_order and model.image_size as the weights want them."
        )
    return directory


def restore_optimizers(
    directory: Path, *, engine: BackboneEngine, head: ShardedHead, head_optimizer: HeadSGD, fingerprint: str
) -> RunPosition:
    """Momentum of the backbone, centres and momentum of the head, and the position; weights were loaded before.

    Raises:
        CheckpointError: the checkpoint was trained on other data or with another number of classes.
    """
    state = read_training_state(directory)
    if state["num_classes"] != head.num_classes:
        raise CheckpointError(
            f"{directory} has {state['num_classes']} classes, the training set {head.num_classes}. "
            "Resume with the data the run was started on, or start a new run."
        )
    if state["dataset_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{directory} was trained on other shards (manifest {state['dataset_fingerprint'][:12]}, now "
            f"{fingerprint[:12]}). Resume with those, or start a new run."
        )
    engine.load_momentum(load_file(directory / OPTIMIZER_FILE))
    load_head(directory, head, head_optimizer)
    return RunPosition(step=state["step"], samples_seen=state["samples_seen"])


def load_head(directory: Path, head: ShardedHead, optimizer: HeadSGD | None = None) -> None:
    """Fill a head with its class range from the files of any number of ranks.

    Raises:
        CheckpointError: the files do not cover the classes of this head, or are of another kind or number of classes.
    """
    paths = sorted(directory.glob("head-*.safetensors"))
    start, stop = head.class_range
    filled = 0
    with torch.no_grad():
        for path in paths:
            with safe_open(path, framework="pt") as file:
                _copy_statistics(path, file, head)
                filled += _copy_range(file, file.metadata(), head, optimizer, start, stop)
    if filled != stop - start:
        raise CheckpointError(f"{directory}: its head files hold {filled} of the {stop - start} classes of this rank.")


def _copy_statistics(path: Path, file: Any, head: ShardedHead) -> None:
    """Running statistics, after a look at what the file is of; it may hold more than this kind of head has."""
    if int(file.metadata()["num_classes"]) != head.num_classes:
        raise CheckpointError(
            f"{path} has {file.metadata()['num_classes']} classes, the training set {head.num_classes}. "
            "Take the data the run was started on, or start a new run."
        )
    known = set(file.keys())
    for name, value in head.statistics().items():
        if name not in known:
            raise CheckpointError(
                f"{path} has no {name}, which head.kind = {head.config.kind} keeps: it was trained with another head. "
                "Set `head` as in the config.yaml of that run, or start a new run."
            )
        value.copy_(file.get_tensor(name))


def _copy_range(
    file: Any, metadata: Mapping[str, str], head: ShardedHead, optimizer: HeadSGD | None, start: int, stop: int
) -> int:
    first, last = int(metadata["class_start"]), int(metadata["class_stop"])
    low, high = max(first, start), min(last, stop)
    if low >= high:
        return 0
    targets: Sequence[tuple[str, Tensor]] = [("weight", head.weight)]
    if optimizer is not None:
        targets = [*targets, ("momentum", optimizer.momentum_buffer)]
    for name, target in targets:
        target[low - start : high - start] = file.get_slice(name)[low - first : high - first].to(target.device)
    return high - low
