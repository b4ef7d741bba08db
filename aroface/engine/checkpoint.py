"""The state of a run into memory, for a checkpoint in the canonical layout, and back, at any number of ranks."""

import hashlib
import importlib.metadata
import json
import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from aroface import __version__
from aroface.config.schema import TrainConfig
from aroface.engine.best import Best
from aroface.engine.checkpoint_layout import (
    BACKBONE_FILE,
    FORMAT_VERSION,
    OPTIMIZER_FILE,
    head_file,
    read_state,
    read_training_state,
    resolve_checkpoint,
    task_file,
)
from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.engine.task import contract_of
from aroface.errors import CheckpointError, ConfigError
from aroface.heads import HeadSGD, ShardedHead

__all__ = [
    "RunPosition",
    "Snapshot",
    "TensorFile",
    "head_contents",
    "initial_checkpoint",
    "load_backbone",
    "load_head",
    "load_task_state",
    "load_weights",
    "restore_optimizers",
    "take_snapshot",
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
    """Commit of the code, `-dirty-` and a hash of the changes where there are some; `unknown` without a checkout."""
    try:
        commit = _git("describe", "--always", "--dirty", "--abbrev=40").decode().strip()
        if commit.endswith("-dirty"):
            commit += "-" + hashlib.sha256(_git("diff", "--binary", "HEAD")).hexdigest()[:12]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit


def _git(*words: str) -> bytes:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=20, check=True).stdout


class TensorFile(NamedTuple):
    """What one safetensors file holds."""

    tensors: dict[str, Tensor]  #: on the CPU, contiguous, copies
    metadata: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes for a checkpoint, copied to memory: training may go on while it is written."""

    step: int
    rank: int
    world_size: int
    files: Mapping[str, TensorFile]  #: file name -> contents
    state: Mapping[str, Any] | None  #: of state.json, on rank 0
    best: Best | None = None  #: the best checkpoint so far, this one included


def take_snapshot(
    position: RunPosition,
    *,
    config: TrainConfig,
    engine: BackboneEngine,
    head: ShardedHead,
    head_optimizer: HeadSGD,
    fingerprint: str,
    task_state: Mapping[str, Tensor],
    best: Best | None = None,
) -> Snapshot:
    """Copy the state of a run; a collective. Running batch-norm statistics become the same on all ranks.

    `task_state` is what the task of this rank carries into its next step (`FaceTask.state_tensors`).
    """
    is_first = head.rank == 0
    weights = engine.weights(settle=True, is_wanted=is_first)
    momentum = engine.momentum(is_wanted=is_first)
    files = {head_file(head.rank, head.world_size): head_contents(head, head_optimizer)}
    if task_state:
        files[task_file(head.rank, head.world_size)] = TensorFile(dict(task_state), {})
    state = None
    if is_first:
        files[BACKBONE_FILE] = TensorFile(weights, _inference_metadata(position, config))
        files[OPTIMIZER_FILE] = TensorFile(momentum, {})
        state = _state(position, config, head, engine, fingerprint, best)
    return Snapshot(position.step, head.rank, head.world_size, files, state, best)


def _state(
    position: RunPosition,
    config: TrainConfig,
    head: ShardedHead,
    engine: BackboneEngine,
    fingerprint: str,
    best: Best | None,
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": position.step,
        "samples_seen": position.samples_seen,
        "config": config.model_dump(mode="json"),
        "contract": contract_of(config).model_dump(mode="json"),
        "num_classes": head.num_classes,
        "dataset_fingerprint": fingerprint,
        "rng": {"seed": config.seed, "rule": "derived from (seed, purpose, step, rank)"},
        "scaler": engine.scaler.state(),
        "best": None if best is None else best.record(),
        "world_size": head.world_size,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _inference_metadata(position: RunPosition, config: TrainConfig) -> dict[str, str]:
    """What makes the weights a model by themselves: the network and what its input must look like."""
    return {
        "format": "pt",
        "model": json.dumps(config.model.model_dump(mode="json")),
        "contract": json.dumps(contract_of(config).model_dump(mode="json")),
        "step": str(position.step),
        "aroface": __version__,
    }


def head_contents(head: ShardedHead, optimizer: HeadSGD) -> TensorFile:
    """Copies of the centres of this rank, their momentum and the running statistics."""
    named = {
        "weight": head.weight,
        "momentum": optimizer.momentum_buffer,
        **head.statistics(),
    }
    start, stop = head.class_range
    metadata = {
        "class_start": str(start),
        "class_stop": str(stop),
        "num_classes": str(head.num_classes),
        "kind": head.config.kind,
    }
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in named.items()}
    return TensorFile(copies, metadata)


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
        CheckpointError: the checkpoint is of another network, or its weights are not finite.
    """
    from aroface.weights.tensor_files import refuse_bad_numbers  # here, for that package imports this module

    weights, path = load_weights(directory), directory / BACKBONE_FILE
    own = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [name for name in dict.fromkeys([*own, *saved]) if own.get(name) != saved.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path} is of another network: {len(wrong)} tensors differ, the first is {wrong[0]} with shape "
            f"{saved.get(wrong[0])}, here {own.get(wrong[0])}. {_nearest(weights, path)} Set `model` as in its "
            "state.json."
        )
    for name, value in weights.items():
        if value.is_floating_point():
            refuse_bad_numbers(name, value, f"{path}: {name}")
    backbone.load_state_dict(weights)


def _nearest(weights: Mapping[str, Tensor], path: Path) -> str:
    """Which known network the weights are, or are nearest to."""
    from aroface.weights.layouts import recognise

    try:
        return f"The file holds {recognise(weights, name=path.name).config.name}."
    except (CheckpointError, ConfigError) as error:
        return str(error)


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
    """Momentum of the backbone, centres and momentum of the head, loss scale, position; weights were loaded before.

    Raises:
        CheckpointError: the checkpoint was trained on other data, with another head, or another number of classes.
    """
    state = read_training_state(directory)
    kind = state["config"]["head"]["kind"]
    if kind != head.config.kind:
        raise CheckpointError(
            f"{directory} was trained with head.kind = {kind}, not {head.config.kind}, and the class centres of one "
            f"head mean little to another. Set head.kind = {kind} to continue, or start a new run."
        )
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
    engine.scaler.load_state(state.get("scaler"))
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
