"""Writes snapshots to disk beside the training: each rank its own files, rank 0 the rest and the end of it.

Ranks meet over the file system while they write, so that no thread but the training's own takes part in collectives: a
rank leaves a receipt (checksums of its files) in the temporary directory; rank 0 waits for all receipts, writes
COMPLETE and renames. Errors come up in the training thread, on all ranks, at the next step or save.
"""

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from aroface.config.engine import CheckpointConfig
from aroface.distributed import any_rank_each
from aroface.engine.best import write_best
from aroface.engine.checkpoint import Snapshot
from aroface.engine.checkpoint_layout import (
    BACKBONE_FILE,
    MODEL_FILE,
    finish_checkpoint,
    list_checkpoints,
    prune,
    start_checkpoint,
    temporary_directory,
    write_state,
)
from aroface.errors import CheckpointError
from aroface.files import fsync_directory, read_json, sha256_of, write_json

__all__ = ["CheckpointSaver", "write_snapshot"]

_POLL_S = 0.02
#: For a save that was told to end; one that hangs in a write is left behind, and dies with the process.
_LAST_WAIT_S = 10.0

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """One save at a time, in the background where the settings say so.

    Args:
        run: run directory.
        config: what is kept, and whether training waits.
        rank: of this process.
        on_wait: called again and again while training waits for a disk.
        patience_s: seconds that training waits for a disk at most, before all ranks give up.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        *,
        rank: int,
        on_wait: Callable[[], None] = lambda: None,
        patience_s: float = math.inf,
    ) -> None:
        self._run, self._config, self._rank = run, config, rank
        self._on_wait, self._patience_s = on_wait, patience_s
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._error: Exception | None = None
        self._step = 0

    @property
    def has_failed(self) -> bool:
        """Whether the files of this rank could not be written; to be shared with the other ranks, then `fail`."""
        return self._error is not None

    @property
    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Wait for the save before, then write this one; a collective.

        Raises:
            CheckpointError: a save failed on some rank.
        """
        self.settle()
        self._step = snapshot.step
        if self._rank == 0:
            try:
                start_checkpoint(self._run, snapshot.step)
            except OSError as error:
                self._error = error
        self._meet()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.background:
            self.settle()

    def settle(self) -> None:
        """Wait until the save that is under way is on disk, on all ranks; a collective.

        Raises:
            CheckpointError: it failed on some rank, or took longer than the patience there is.
        """
        end = time.monotonic() + self._patience_s
        while self._meet(is_late=time.monotonic() > end):
            self._on_wait()
            time.sleep(_POLL_S)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _meet(self, *, is_late: bool = False) -> bool:
        """Whether some rank still writes. A wait in small collectives: a slow disk is no hung rank."""
        is_busy = self._is_busy  # asked first: a thread that ends in between has left its error
        is_some_busy, has_failed, is_too_late = any_rank_each([is_busy, self.has_failed, is_busy and is_late])
        if has_failed:
            self.fail()
        if is_too_late:
            self._cancelled.set()
            raise CheckpointError(
                f"Saving step {self._step} to {self._run} did not end within {self._patience_s:g} s "
                "(4 x engine.timeout_s) on some rank; its disk or file system hangs. Older checkpoints were not "
                "touched. Mend it, and give the same command again; raise engine.timeout_s if a save may take so long."
            )
        return is_some_busy

    def close(self, *, patience_s: float) -> None:
        """Let a save that is under way come to its end without the other ranks' help; for the way out of an error."""
        if self._thread is None:
            return
        self._thread.join(patience_s)
        self._cancelled.set()
        self._thread.join(_LAST_WAIT_S)
        if self._is_busy:
            logger.warning("The checkpoint of step %d is given up: its disk hangs.", self._step)

    def fail(self) -> None:
        """Give up after a failed save on some rank; called on all ranks.

        Raises:
            CheckpointError: always.
        """
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(_LAST_WAIT_S)
        if self._rank == 0 and not self._is_busy:
            shutil.rmtree(temporary_directory(self._run, self._step), ignore_errors=True)
        whole = list_checkpoints(self._run)
        kept = f"{whole[-1].name} is as it was" if whole else "there is no older one"
        reason = self._error or "another rank could not write, its message tells why"
        raise CheckpointError(
            f"Saving step {self._step} to {self._run} failed: {reason}. Older checkpoints were not touched: {kept}. "
            "Free space or mend the disk, and give the same command again: it continues from there."
        )

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_snapshot(snapshot, self._run, self._config, cancelled=self._cancelled)
        except Exception as error:  # comes up in the training thread
            self._error = error


def write_snapshot(
    snapshot: Snapshot, run: Path, config: CheckpointConfig, *, cancelled: threading.Event | None = None
) -> None:
    """Write what one rank has to write; on rank 0 also wait for the others, finish, name the best, and prune.

    Needs the temporary directory of the step, and no process group.

    Args:
        snapshot: of this rank.
        run: run directory.
        config: what is kept.
        cancelled: set when the save will not come to an end on another rank.
    """
    temporary = temporary_directory(run, snapshot.step)
    entries = _write_files(temporary, snapshot)
    if snapshot.rank:
        fsync_directory(temporary)
        write_json(_receipt(temporary, snapshot.rank), {"files": entries})
        return
    assert snapshot.state is not None  # noqa: S101 - rank 0 has it
    write_state(temporary, snapshot.state)
    for rank in range(1, snapshot.world_size):
        receipt = _receipt(temporary, rank)
        while not receipt.is_file():
            if cancelled is None:
                time.sleep(_POLL_S)
            elif cancelled.wait(_POLL_S):
                logger.warning("The checkpoint of step %d was given up: rank %d did not write.", snapshot.step, rank)
                return
        entries |= read_json(receipt)["files"]
        receipt.unlink()
    finish_checkpoint(temporary, run, snapshot.step, known=entries)
    write_best(run, snapshot.best)
    prune(run, keep_last=config.keep_last, keep_every=config.keep_every, best=snapshot.best)


def _receipt(temporary: Path, rank: int) -> Path:
    return temporary / f"receipt-{rank:05d}.json"


def _write_files(temporary: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write and sync; returns the entries of COMPLETE."""
    entries: dict[str, Any] = {}
    for name, content in snapshot.files.items():
        path = temporary / name
        save_file(content.tensors, path, metadata=content.metadata)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        entries[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        if name == BACKBONE_FILE:
            _link(path, temporary / MODEL_FILE)
            entries[MODEL_FILE] = entries[name]
    return entries


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)
        with other.open("rb+") as file:
            os.fsync(file.fileno())
