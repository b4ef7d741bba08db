"""The processes of a packing: each maps the plan from disk and writes shards, one at a time."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path, read_json, write_json
from shards.duplicates import HASH_BYTES, hash_image
from shards.image_table import ImageTable
from shards.permutation import permute
from shards.prepare import Preparation
from shards.shard_writer import shard_name, write_shard
from shards.sources import Source, SourceOptions, open_source

__all__ = ["ROWS_PER_HASH_TASK", "Job", "PackWorker", "ShardRecord", "run_tasks"]

ROWS_PER_HASH_TASK = 16384
_ORDER_SEED = 0

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ShardRecord:
    """What a worker reports of one finished shard."""

    name: str
    samples: int
    bytes: int
    sha256: str
    sizes: list[tuple[int, int]]  #: distinct (width, height)
    bad: list[tuple[int, str, str]] = field(default_factory=list)  #: (row, key, reason) of images that were left out


@dataclass(frozen=True)
class Job:
    """What every worker has to know; the images themselves lie in `work`."""

    sources: tuple[Path, ...]
    options: SourceOptions
    out: Path
    work: Path  #: folder of the plan: the table, the chosen rows and their labels
    samples_per_shard: int
    preparation: Preparation


def scratch_of(scratch: Path | None, source: int) -> Path | None:
    """The part of a scratch folder that belongs to one source."""
    return None if scratch is None else scratch / str(source)


class PackWorker:
    """Writes the shards of one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._table = ImageTable.load(job.work / "table")
        self._sources: list[Source] = [
            open_source(path, job.options, scratch=scratch_of(job.work / "scratch", number))
            for number, path in enumerate(job.sources)
        ]
        self._chosen: tuple[NDArray[np.int64], NDArray[np.int32]] | None = None

    def _selection(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        if self._chosen is None:
            rows = np.load(self._job.work / "rows.npy", mmap_mode="r", allow_pickle=False)
            self._chosen = rows, np.load(self._job.work / "labels.npy", allow_pickle=False)
        return self._chosen

    def write(self, shard: int) -> ShardRecord:
        """Write tar, index, hashes and record of one shard, in this order, each atomically."""
        rows, labels = self._selection()
        size = self._job.samples_per_shard
        places = np.arange(shard * size, min(len(rows), (shard + 1) * size))
        chosen = rows[permute(places, size=len(rows), seed=_ORDER_SEED, epoch=0)]
        hashes = np.zeros((len(chosen), HASH_BYTES), np.uint8)
        sizes: set[tuple[int, int]] = set()
        bad: list[tuple[int, str, str]] = []
        name = shard_name(shard)
        with write_shard(self._job.out, name) as writer:
            labelled = zip(self._table.entries(chosen), labels[self._table.identity[chosen]].tolist(), strict=True)
            for place, ((key, source, entry), label) in enumerate(labelled):
                try:
                    data = self._sources[source].read(entry)
                    prepared = self._job.preparation.apply(data, entry.landmarks, name=key)
                except DataError as error:
                    bad.append((int(chosen[place]), key, str(error)))
                    continue
                hashes[place] = memoryview(hash_image(data))
                sizes.add(prepared.size)
                stored = key if prepared.suffix is None else f"{key.rpartition('.')[0]}{prepared.suffix}"
                writer.add(stored, prepared.data, label)
        _save(self._job.work / f"{name}.hashes.npy", hashes)
        _save(self._job.work / f"{name}.rows.npy", chosen)
        samples, digest = len(writer.labels), writer.entry.sha256 if writer.entry else ""
        record = ShardRecord(f"{name}.tar", samples, writer.bytes, digest, sorted(sizes), bad)
        write_json(record_path(self._job.work, shard), asdict(record))
        return record

    def hash(self, task: int) -> int:
        """Hash the files of one range of rows into the work folder; returns how many."""
        path = self._job.work / f"hashes-{task:06d}.npy"
        start, stop = task * ROWS_PER_HASH_TASK, min(len(self._table), (task + 1) * ROWS_PER_HASH_TASK)
        if path.is_file():
            return stop - start
        hashes = np.zeros((stop - start, HASH_BYTES), np.uint8)
        for place, (_, source, entry) in enumerate(self._table.entries(np.arange(start, stop))):
            try:
                hashes[place] = np.frombuffer(hash_image(self._sources[source].read(entry)), np.uint8)
            except DataError:
                continue  # it has no twin; the writing pass reports it
        _save(path, hashes)
        return stop - start


def _save(path: Path, values: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def record_path(work: Path, shard: int) -> Path:
    """Where the record of a finished shard lies."""
    return work / f"{shard_name(shard)}.json"


def finished_record(job: Job, shard: int) -> ShardRecord | None:
    """The record of a shard that an earlier run finished, if its files are still there."""
    path = record_path(job.work, shard)
    if not path.is_file():
        return None
    values = read_json(path)
    tar = job.out / values["name"]
    if values["samples"] and not (
        tar.with_suffix(".idx").is_file() and tar.is_file() and tar.stat().st_size == values["bytes"]
    ):
        return None
    values["sizes"] = [tuple(size) for size in values["sizes"]]
    values["bad"] = [tuple(entry) for entry in values["bad"]]
    return ShardRecord(**values)


def run_tasks(
    job: Job, method: Callable[[PackWorker, int], _Result], tasks: Sequence[int], *, workers: int
) -> Iterator[tuple[int, _Result]]:
    """Results of `method(worker, task)` as they come, from `workers` processes; from this one where one is enough.

    Raises:
        DataError: as the method; a full disk or another refusal of the system is one too.
    """
    try:
        if min(workers, len(tasks)) <= 1:
            worker = PackWorker(job)
            yield from ((task, method(worker, task)) for task in tasks)
            return
        yield from _run_in_processes(job, method, tasks, min(workers, len(tasks)))
    except OSError as error:
        raise DataError(
            f"Packing into {job.out} stopped: {error.strerror or error}. Finished shards are kept: make room or put it "
            "right, then repeat the same command."
        ) from error


def _run_in_processes(
    job: Job, method: Callable[[PackWorker, int], _Result], tasks: Sequence[int], workers: int
) -> Iterator[tuple[int, _Result]]:
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    try:
        futures = {pool.submit(_run_in_worker, method, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: PackWorker | None = None


def _start_worker(job: Job) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = PackWorker(job)


def _end_with_parent() -> None:
    """Without this, workers of a killed packer would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(method: Callable[[PackWorker, int], _Result], task: int) -> _Result:
    assert _worker is not None  # noqa: S101 - set by the pool's initialiser
    return method(_worker, task)
