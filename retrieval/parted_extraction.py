"""A large set embedded in parts, by any number of processes that share a folder and nothing else.

    DIR/job.json               what is embedded, by what: every process must mean the same
    DIR/parts/part-NNNNN.npz   finished parts
    DIR/parts/part-NNNNN.lock  held by the process that works on the part; the system frees it when the process ends
    DIR/index.json             written last: the set is whole

Whoever is free takes the next part that nobody works on, so uneven work and slow machines balance, and a process that
is killed loses the part in hand only. A part is written whole or not at all.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aroface.errors import DataError
from aroface.files import read_json, write_json
from aroface.locks import try_lock
from retrieval.embedding_files import INDEX_NAME, write_embeddings, write_index
from retrieval.embeddings import EmbeddingSet

__all__ = ["PartedExtraction", "extraction_progress", "part_bounds"]

logger = logging.getLogger(__name__)

_JOB_NAME = "job.json"
_PARTS = "parts"
_SOURCE = "source_sha256"
_POLL_S = 0.5


def part_bounds(num_rows: int, *, images_per_part: int, groups: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """[start, stop) of every part: at most `images_per_part` rows, never across two groups (such as shards)."""
    bounds: list[tuple[int, int]] = []
    for row in range(num_rows):
        is_new_group = row > 0 and groups is not None and groups[row] != groups[row - 1]
        if not bounds or is_new_group or row - bounds[-1][0] >= images_per_part:
            bounds.append((row, row + 1))
        else:
            bounds[-1] = (bounds[-1][0], row + 1)
    return bounds


def extraction_progress(folder: Path) -> tuple[int, int] | None:
    """(rows done, rows in all) of an extraction that any process has begun; None before that."""
    path = folder / _JOB_NAME
    if not path.is_file():
        return None
    bounds = read_json(path)["bounds"]
    done = sum(stop - start for number, (start, stop) in enumerate(bounds) if _part_path(folder, number).is_file())
    return done, bounds[-1][1] if bounds else 0


def _part_path(folder: Path, number: int) -> Path:
    return folder / _PARTS / f"part-{number:05d}.npz"


class PartedExtraction:
    """The shared state of one extraction, as one process sees it.

    Args:
        folder: empty, new, or of the same extraction, which goes on.
        description: model and settings in words that `json` can hold.
        source: digest of the images, which tells those of the same names from one another.
        keys: names of all images, in order.
        bounds: [start, stop) rows of every part, see `part_bounds`.

    Raises:
        DataError: the folder holds something else, or an extraction of other images or with another model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        description: Mapping[str, Any],
        source: str,
        keys: Sequence[str],
        bounds: Sequence[tuple[int, int]],
    ) -> None:
        self._folder = folder
        self._bounds = list(bounds)
        job = {
            **description,
            "images_sha256": hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest(),
            _SOURCE: source,
            "bounds": [list(bound) for bound in bounds],
        }
        self._job: dict[str, Any] = json.loads(json.dumps(job))
        self._join()

    def _join(self) -> None:
        path = self._folder / _JOB_NAME
        if self._folder.exists() and not self._folder.is_dir():
            raise DataError(f"--out {self._folder} is a file; name a folder, or end it in .npz.")
        if not path.is_file():
            strangers = [entry.name for entry in self._folder.glob("[!.]*") if entry.name not in (_JOB_NAME, _PARTS)]
            if strangers:
                raise DataError(f"{self._folder} holds {strangers[0]} and no {_JOB_NAME}; name an empty folder.")
        (self._folder / _PARTS).mkdir(parents=True, exist_ok=True)
        while not path.is_file():
            with try_lock(self._folder / _PARTS / "job.lock") as lock:
                if lock.is_mine and not path.is_file():
                    write_json(path, self._job)
        found = read_json(path)
        if _SOURCE not in found:
            logger.warning(
                "%s was begun by an earlier version, which did not note what the images were. Where any of them was "
                "replaced since, remove that folder or name another one.",
                self._folder,
            )
            found[_SOURCE] = self._job[_SOURCE]
        self._compare(found)

    def _compare(self, found: Mapping[str, Any]) -> None:
        differing = [key for key in (*self._job, *found) if found.get(key) != self._job.get(key)]
        if {*differing} == {_SOURCE}:
            raise DataError(
                f"{self._folder} holds embeddings of other images of the same names: images or their landmarks were "
                "replaced since. Remove that folder to embed all of them anew, or name another one."
            )
        if differing:
            key = differing[0]
            raise DataError(
                f"{self._folder} holds another extraction: {key} is {_short(found.get(key))} there and "
                f"{_short(self._job.get(key))} here. Name another folder, or remove that one."
            )

    @property
    def is_complete(self) -> bool:
        """Whether the index is there."""
        return (self._folder / INDEX_NAME).is_file()

    @property
    def rows_done(self) -> int:
        """Rows of the parts that are finished, by any process."""
        return sum(stop - start for number, (start, stop) in enumerate(self._bounds) if self._path(number).is_file())

    def work(self, embed: Callable[[int, int], EmbeddingSet], *, on_idle: Callable[[], None] = lambda: None) -> int:
        """Embed parts until all are there, then write the index.

        Args:
            embed: (start, stop) -> the rows of that part.
            on_idle: called now and then while other processes finish theirs.

        Returns:
            Parts that this process made.
        """
        made = 0
        while not self.is_complete:
            missing = [number for number in range(len(self._bounds)) if not self._path(number).is_file()]
            made_now = sum(self._try(number, embed) for number in missing)
            made += made_now
            if not missing:
                self._finish()
            if not made_now and not self.is_complete:
                on_idle()
                time.sleep(_POLL_S)
        return made

    def _try(self, number: int, embed: Callable[[int, int], EmbeddingSet]) -> int:
        """Make one part unless another process is at it or has finished it; how many parts were made."""
        with try_lock(self._path(number).with_suffix(".lock")) as lock:
            if not lock.is_mine or self._path(number).is_file():
                return 0
            write_embeddings(self._path(number), embed(*self._bounds[number]))
            return 1

    def _finish(self) -> None:
        """Write the index, unless another process is about to."""
        with try_lock(self._folder / _PARTS / "index.lock") as lock:
            if not lock.is_mine or self.is_complete:
                return
            write_index(self._folder, [f"{_PARTS}/{self._path(number).name}" for number in range(len(self._bounds))])
            for left_over in [*(self._folder / _PARTS).glob("*.lock"), *(self._folder / _PARTS).glob(".*.tmp")]:
                left_over.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return _part_path(self._folder, number)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
