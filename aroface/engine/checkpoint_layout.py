"""The canonical checkpoint on disk: pickle-free, independent of the number of ranks and of the ZeRO stage.

    RUN/step-NNNNNNNN/
        backbone.safetensors            state dict of the backbone, buffers included; network and input contract in the
                                        metadata, so that the file alone is a model
        model.safetensors               the same file under the name for inference (a hard link where there are such)
        optimizer.safetensors           momentum of every trained backbone parameter, float32, whole
        head-RRRRR-of-NNNNN.safetensors class centres, their momentum, norm statistics; class range in the metadata
        task-RRRRR-of-NNNNN.safetensors what a rank carries into its next step; only where there is something to carry
        state.json                      step, samples seen, configuration, contract, versions, fingerprint of the data
        COMPLETE                        written last: SHA-256 and length of each file
    RUN/best.json                       names the best checkpoint so far, where an evaluation selects one

A checkpoint is written under a temporary name, synced, and renamed. A directory without a valid COMPLETE is never read.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aroface.engine.best import BEST_FILE, Best, read_best
from aroface.errors import CheckpointError, DataError
from aroface.files import fsync_directory, read_json, sha256_of, write_json

__all__ = [
    "BACKBONE_FILE",
    "FORMAT_VERSION",
    "MODEL_FILE",
    "OPTIMIZER_FILE",
    "STATE_FILE",
    "best_of",
    "finish_checkpoint",
    "head_file",
    "list_checkpoints",
    "newest_valid",
    "prune",
    "read_complete",
    "read_state",
    "read_training_state",
    "remove_torn",
    "resolve_checkpoint",
    "start_checkpoint",
    "step_directory",
    "step_of",
    "task_file",
    "temporary_directory",
    "torn_saves",
    "verify_checkpoint",
    "write_state",
]

FORMAT_VERSION = 1
BACKBONE_FILE = "backbone.safetensors"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_COMPLETE_FILE = "COMPLETE"
_STEP_NAME = re.compile(r"step-(\d{8})")
_TEMPORARY_NAME = re.compile(r"\.step-\d{8}\.tmp")

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


def step_of(directory: Path) -> int:
    """Step of a checkpoint, from its name."""
    return int(directory.name.removeprefix("step-"))


def temporary_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is made."""
    return run / f".step-{step:08d}.tmp"


def start_checkpoint(run: Path, step: int) -> Path:
    """A fresh temporary directory for the files of a step; leftovers of a killed save are removed."""
    temporary = temporary_directory(run, step)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def finish_checkpoint(
    temporary: Path, run: Path, step: int, *, known: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Hash and sync the files, write COMPLETE, and move the directory to its name.

    Args:
        temporary: holds the files.
        run: run directory.
        step: of the checkpoint.
        known: entries of COMPLETE of files that are synced already; the others are hashed here.
    """
    files = {}
    for path in sorted(temporary.iterdir()):
        if known is not None and path.name in known:
            files[path.name] = dict(known[path.name])
            continue
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


def torn_saves(run: Path) -> list[Path]:
    """Directories of saves that were cut short, oldest first; nothing reads them."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if path.is_dir() and _TEMPORARY_NAME.fullmatch(path.name))


def remove_torn(run: Path) -> None:
    """Delete what killed saves left behind; for the only process that writes checkpoints there."""
    for path in torn_saves(run):
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run: Path) -> list[Path]:
    """Step directories of a run, oldest first, whole or not."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name))


def read_complete(directory: Path) -> dict[str, Any]:
    """The contents of COMPLETE.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
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
    if not isinstance(complete.get("files"), dict):
        raise CheckpointError(f"{directory / _COMPLETE_FILE} lists no files; the checkpoint is damaged.")
    return complete


def verify_checkpoint(directory: Path) -> None:
    """Check a checkpoint against its COMPLETE.

    Raises:
        CheckpointError: no COMPLETE, another format, or a file that is missing, of another length or of other bytes.
    """
    hashed: dict[int, str] = {}  # by inode: a model that is a hard link is read once
    for name, expected in read_complete(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is damaged. Use an older one.")
        status = path.stat()
        if status.st_size == expected["bytes"] and status.st_ino not in hashed:
            hashed[status.st_ino] = sha256_of(path)
        if status.st_size != expected["bytes"] or hashed[status.st_ino] != expected["sha256"]:
            raise CheckpointError(f"{path} does not have the checksum it was saved with. Use an older checkpoint.")


def newest_valid(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged and torn ones are named in the log and passed over."""
    for torn in torn_saves(run):
        logger.warning("Passing over %s: a save that was cut short.", torn)
    for directory in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(directory)
        except CheckpointError as error:
            logger.warning("Passing over a damaged checkpoint: %s", error)
            continue
        return directory
    return None


def resolve_checkpoint(path: Path) -> Path:
    """A step directory as it is, the newest whole one of a run directory, or the one that a best.json names; verified.

    Raises:
        CheckpointError: there is none.
    """
    if path.name == BEST_FILE and path.is_file():
        best = read_best(path.parent)
        assert best is not None  # noqa: S101 - the file is there
        path = step_directory(path.parent, best.step)
        if not path.is_dir():
            raise CheckpointError(
                f"{path.parent / BEST_FILE} names {path.name}, which is gone; name another checkpoint."
            )
    if _STEP_NAME.fullmatch(path.name) and path.is_dir():
        verify_checkpoint(path)
        return path
    found = newest_valid(path)
    if found is None:
        what = "holds no whole checkpoint" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        brought = "; `aroface import` makes a run of weights of other projects" if path.is_file() else ""
        raise CheckpointError(f"{path} {what}; give a run directory or one of its step-NNNNNNNN directories{brought}.")
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


def prune(
    run: Path,
    *,
    keep_last: int,
    keep_every: int | None = None,
    best: Best | None = None,
    is_dry: bool = False,
    is_good: Callable[[Path], bool] = lambda _: True,
) -> list[Path]:
    """Delete all but the newest `keep_last` whole checkpoints; returns what was (or, dry, would be) deleted.

    Args:
        run: run directory.
        keep_last: at least 1.
        keep_every: checkpoints of steps divisible by this stay whatever their age.
        best: its checkpoint stays too.
        is_dry: delete nothing.
        is_good: checkpoints that are not do not count as kept; asked of the newest ones, until enough are good.
    """
    whole = [path for path in list_checkpoints(run) if (path / _COMPLETE_FILE).is_file()]
    kept = {best.step} if best is not None else set()
    doomed = [
        path
        for path in whole[: _newest_good(whole, keep_last, is_good)]
        if step_of(path) not in kept and (keep_every is None or step_of(path) % keep_every)
    ]
    for path in [] if is_dry else doomed:
        (path / _COMPLETE_FILE).unlink()  # from here on it is no checkpoint, whenever the deletion is cut short
        shutil.rmtree(path)
    return doomed


def _newest_good(whole: Sequence[Path], count: int, is_good: Callable[[Path], bool]) -> int:
    """Index of the oldest of the newest `count` good ones; 0 where there are fewer."""
    found = 0
    for index in reversed(range(len(whole))):
        found += is_good(whole[index])
        if found == count:
            return index
    return 0


def best_of(checkpoint: Path | None, run: Path) -> Best | None:
    """The best so far, as a checkpoint of this run remembers it; a branch of another run starts without one."""
    if checkpoint is None or checkpoint.parent.resolve() != run.resolve():
        return None
    return Best.from_record(read_state(checkpoint).get("best"))
