"""The canonical checkpoint on disk: pickle-free, independent of the number of ranks and of the ZeRO stage.

    RUN/step-NNNNNNNN/
        backbone.safetensors            state dict of the backbone, buffers included
        optimizer.safetensors           momentum of every trained backbone parameter, float32, whole
        head-RRRRR-of-NNNNN.safetensors class centres, their momentum, norm statistics; class range in the metadata
        task-RRRRR-of-NNNNN.safetensors what a rank carries into its next step; only where there is something to carry
        state.json                      step, samples seen, configuration, contract, versions, fingerprint of the data
        COMPLETE                        written last: SHA-256 and length of each file

A checkpoint is written under a temporary name, synced, and renamed. A directory without a valid COMPLETE is never read.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aroface.errors import CheckpointError, DataError
from aroface.files import fsync_directory, read_json, sha256_of, write_json

__all__ = [
    "BACKBONE_FILE",
    "FORMAT_VERSION",
    "OPTIMIZER_FILE",
    "STATE_FILE",
    "finish_checkpoint",
    "head_file",
    "list_checkpoints",
    "newest_valid",
    "prune",
    "read_state",
    "read_training_state",
    "resolve_checkpoint",
    "start_checkpoint",
    "step_directory",
    "task_file",
    "verify_checkpoint",
    "write_state",
]

FORMAT_VERSION = 1
BACKBONE_FILE = "backbone.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_COMPLETE_FILE = "COMPLETE"
_STEP_NAME = re.compile(r"step-(\d{8})")

logger = logging.getLogger(__name__)


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"step-{step:08d}"


def head_file(rank: int, world_size: int) -> str:
    """File name of one rank's classes."""
    return f"head-{rank:05d}-of-{world_size:05d}.safetensors"


def task_file(rank: int, world_size: int) -> str:
    """File name of what one rank's task carries into the next step."""
    return f"task-{rank:05d}-of-{world_size:05d}.safetensors"


def start_checkpoint(run: Path, step: int) -> Path:
    """A fresh temporary directory for the files of a step; leftovers of a killed save are removed."""
    temporary = run / f".step-{step:08d}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def finish_checkpoint(temporary: Path, run: Path, step: int) -> Path:
    """Hash and sync the files, write COMPLETE, and move the directory to its name."""
    files = {}
    for path in sorted(temporary.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    write_json(temporary / _COMPLETE_FILE, {"format_version": FORMAT_VERSION, "files": files})
    final = step_directory(run, step)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_directory(run)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """Step directories of a run, oldest first, whole or not."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name))


def verify_checkpoint(directory: Path) -> None:
    """Check a checkpoint against its COMPLETE.

    Raises:
        CheckpointError: no COMPLETE, another format, or a file that is missing, of another length or of other bytes.
    """
    if not (directory / _COMPLETE_FILE).is_file():
        raise CheckpointError(
            f"{directory} is not a whole checkpoint: it has no COMPLETE file. The save was cut short."
        )
    try:
        complete = read_json(directory / _COMPLETE_FILE)
    except DataError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if complete.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has checkpoint format {complete.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}."
        )
    for name, expected in complete["files"].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is damaged. Use an older one.")
        if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} does not have the checksum it was saved with. Use an older checkpoint.")


def newest_valid(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log and passed over."""
    for directory in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(directory)
        except CheckpointError as error:
            logger.warning("Passing over a damaged checkpoint: %s", error)
            continue
        return directory
    return None


def resolve_checkpoint(path: Path) -> Path:
    """A step directory as it is, or the newest whole one of a run directory; verified.

    Raises:
        CheckpointError: there is none.
    """
    if _STEP_NAME.fullmatch(path.name) and path.is_dir():
        verify_checkpoint(path)
        return path
    found = newest_valid(path)
    if found is None:
        what = "holds no whole checkpoint" if path.is_dir() else "is not a directory"
        raise CheckpointError(f"{path} {what}; give a run directory or one of its step-NNNNNNNN directories.")
    return found


def read_state(directory: Path) -> dict[str, Any]:
    """The contents of state.json."""
    try:
        return read_json(directory / STATE_FILE)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def read_training_state(directory: Path) -> dict[str, Any]:
    """The contents of state.json of a checkpoint that a run can go on from.

    Raises:
        CheckpointError: it holds weights only, as `aroface import` writes them.
    """
    state = read_state(directory)
    if "config" not in state:
        source = state.get("source", {}).get("file", "elsewhere")
        raise CheckpointError(
            f"{directory} holds weights only, imported from {source}: no class centres, no optimiser, no settings of a "
            "run. It can be embedded with and exported, not resumed or attacked. To train from these weights, start a "
            f"new run in another --run directory with model.init_from={directory}."
        )
    return state


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write state.json inside a checkpoint that is being made."""
    (directory / STATE_FILE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def prune(run: Path, *, keep_last: int, is_kept: Callable[[Path], bool] = lambda path: False) -> list[Path]:
    """Delete all but the newest `keep_last` whole checkpoints; returns what was deleted.

    Args:
        run: run directory.
        keep_last: at least 1.
        is_kept: checkpoints that stay whatever their age.
    """
    whole = [path for path in list_checkpoints(run) if (path / _COMPLETE_FILE).is_file()]
    doomed = [path for path in whole[:-keep_last] if not is_kept(path)]
    for path in doomed:
        (path / _COMPLETE_FILE).unlink()  # from here on it is no checkpoint, whenever the deletion is cut short
        shutil.rmtree(path)
    return doomed
