"""A source to WebDataset shards: deterministic bytes, one process per worker, resumable, each shard whole or absent.

The order of the images is fixed by a seeded permutation before any work is shared out, so the bytes do not depend on
the number of workers. While it runs, OUT/.packing holds the plan and one record per finished shard; a second run with
the same plan continues there, one with another plan is refused. The manifest is written last.
"""

import fcntl
import io
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from aroface.errors import DataError
from aroface.files import atomic_path, read_json, sha256_of, write_json
from aroface.images import decode_rgb
from shards.manifest import MANIFEST_NAME, Identity, Manifest, ShardEntry, write_identities, write_index
from shards.permutation import permute
from shards.sources import Source, open_source

__all__ = ["PackOptions", "pack"]

_WORK_FOLDER = ".packing"
_ORDER_SEED = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackOptions:
    """What shapes the shards. Equal options and an equal source give equal bytes."""

    samples_per_shard: int = 8192
    min_images: int = 1  #: identities with fewer images are left out
    max_bad: int = 0  #: unreadable images that may be skipped
    identities: tuple[str, ...] | None = None  #: only these; None keeps all
    layout: str | None = None  #: source format; None detects it
    licence: str = "unknown"
    template: Literal["arcface_112"] = "arcface_112"  #: what the faces are aligned to; noted, not checked


@dataclass(frozen=True)
class _ShardRecord:
    """What a worker reports of one finished shard."""

    name: str
    samples: int
    bytes: int
    sha256: str
    sizes: list[tuple[int, int]]  #: distinct (width, height)
    labels: dict[str, int]  #: images written per class index
    bad: list[str] = field(default_factory=list)


def pack(
    source_path: Path,
    out: Path,
    options: PackOptions,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Pack a source into a shard directory.

    Args:
        source_path: folder or zip, see `shards.sources`.
        out: new directory, or one that a killed run with the same plan left behind.
        options: what shapes the result.
        workers: processes; does not change the result.
        progress: called with (images done, images in all) after each shard.

    Raises:
        DataError: nothing to pack, too many unreadable images, `out` belongs to something else or to another packer.
    """
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out} already holds finished shards. Name another directory, or remove it first.")
    _check_counts(options, workers)
    source = open_source(source_path, options.layout)
    chosen, names = _choose(source, options)
    plan = _plan(source_path, source, chosen, options)
    _refuse_foreign(out)
    with _only_packer(out):
        _adopt(out, plan)
        total = sum(len(part) for part in _parts(chosen, options))
        records = _run(source_path, out, options, workers, total, progress)
        manifest = _finish(source_path, out, options, names, records)
        shutil.rmtree(out / _WORK_FOLDER)
    return manifest


def _choose(source: Source, options: PackOptions) -> tuple[list[tuple[int, int]], list[str]]:
    """(source index, class index) of the images to keep in source order, and the identity names by class index."""
    counts = Counter(source.identities)
    keep = set(counts)
    if options.identities is not None:
        unknown = sorted(set(options.identities) - keep)
        if unknown:
            raise DataError(f"--identities names {unknown[0]!r} ({len(unknown)} such), which the source does not hold.")
        keep &= set(options.identities)
    small = sum(counts[identity] < options.min_images for identity in keep)
    if small:
        logger.info(
            "%d identities have fewer than %d images and are left out (--min-images).", small, options.min_images
        )
    names = sorted(identity for identity in keep if counts[identity] >= options.min_images)
    if not names:
        raise DataError(
            f"No identity has {options.min_images} images or more: of {len(counts)} identities the largest has "
            f"{max(counts.values())}. Lower --min-images."
        )
    class_of = {name: index for index, name in enumerate(names)}
    chosen = [(i, class_of[name]) for i, name in enumerate(source.identities) if name in class_of]
    _refuse_equal_keys(source, chosen)
    return chosen, names


def _refuse_equal_keys(source: Source, chosen: Sequence[tuple[int, int]]) -> None:
    """Two files of one sample key would be read as one sample."""
    seen: dict[str, str] = {}
    for index, _ in chosen:
        key = source.keys[index]
        other = seen.setdefault(_tar_name(key)[0], key)
        if other != key:
            raise DataError(f"{other!r} and {key!r} would have the same sample key in a shard; rename one of them.")


def _parts(chosen: Sequence[tuple[int, int]], options: PackOptions) -> list[list[tuple[int, int]]]:
    """The images of each shard, in the order in which they are written."""
    order = permute(np.arange(len(chosen)), size=len(chosen), seed=_ORDER_SEED, epoch=0)
    size = options.samples_per_shard
    return [[chosen[i] for i in order[start : start + size]] for start in range(0, len(chosen), size)]


def _plan(
    source_path: Path, source: Source, chosen: Sequence[tuple[int, int]], options: PackOptions
) -> dict[str, object]:
    shaping = {**asdict(options), "max_bad": None}  # raising the tolerance continues the same plan
    choice = sha256(json.dumps([chosen, shaping]).encode()).hexdigest()
    return {"source": source_path.name, "fingerprint": source.fingerprint(), "choice": choice, "images": len(chosen)}


@contextmanager
def _only_packer(out: Path) -> Iterator[None]:
    """Hold the lock of the output directory; the kernel drops it with the process."""
    (out / _WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    with (out / _WORK_FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"Another process is packing into {out}; wait for it, or name another directory."
            ) from error
        yield


def _adopt(out: Path, plan: dict[str, object]) -> None:
    """Start a new plan, or continue the unfinished one that is there; to be called under the lock."""
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out} was finished by another process just now. Name another directory.")
    path = out / _WORK_FOLDER / "plan.json"
    if path.is_file():
        if read_json(path) != plan:
            raise DataError(
                f"{out} holds an unfinished packing of another source or with other options. "
                "Repeat the command that started it, name another directory, or remove this one."
            )
        logger.info("Continuing the unfinished packing in %s.", out)
        for leftover in out.glob(".shard-*.tmp"):  # of a shard that was being written when the run was killed
            leftover.unlink(missing_ok=True)
        return
    write_json(path, plan)


def _refuse_foreign(out: Path) -> None:
    """Accept a directory that is absent, empty, or holds an unfinished packing."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; shards are written into a directory. Name another one.")
    if out.is_dir() and not (out / _WORK_FOLDER).is_dir() and (others := sorted(e.name for e in out.iterdir())):
        raise DataError(f"{out} exists and holds {others[0]!r}. Name another directory, or remove it first.")


def _check_counts(options: PackOptions, workers: int) -> None:
    for setting, value, least in (
        ("--samples-per-shard", options.samples_per_shard, 1),
        ("--min-images", options.min_images, 1),
        ("--max-bad", options.max_bad, 0),
        ("--workers", workers, 1),
    ):
        if value < least:
            raise DataError(f"{setting} is {value}; it must be {least} or more.")


def _run(
    source_path: Path, out: Path, options: PackOptions, workers: int, total: int, progress: Callable[[int, int], None]
) -> list[_ShardRecord]:
    count = -(-total // options.samples_per_shard)
    records = {i: record for i in range(count) if (record := _finished(out, i))}
    todo = [i for i in range(count) if i not in records]
    done = sum(record.samples + len(record.bad) for record in records.values())
    _refuse_bad(records.values(), options.max_bad)
    progress(done, total)
    for index, record in _written(source_path, out, options, todo, workers):
        records[index] = record
        done += record.samples + len(record.bad)
        progress(done, total)
        for message in record.bad:
            logger.warning("Unreadable: %s", message)
        _refuse_bad(records.values(), options.max_bad)
    return [records[i] for i in range(count)]


def _written(
    source_path: Path, out: Path, options: PackOptions, todo: Sequence[int], workers: int
) -> Iterator[tuple[int, _ShardRecord]]:
    if min(workers, len(todo)) <= 1:
        worker = _Worker(source_path, out, options)
        yield from ((index, worker.write(index)) for index in todo)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(source_path, out, options),
    )
    try:
        futures = {pool.submit(_write_in_worker, index): index for index in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: "_Worker | None" = None


def _start_worker(source_path: Path, out: Path, options: PackOptions) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(source_path, out, options)


def _end_with_parent() -> None:
    """Without this, workers of a killed packer would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _write_in_worker(index: int) -> _ShardRecord:
    assert _worker is not None  # noqa: S101 - set by the pool's initialiser
    return _worker.write(index)


class _Worker:
    """Writes shards of one plan."""

    def __init__(self, source_path: Path, out: Path, options: PackOptions) -> None:
        self._source = open_source(source_path, options.layout)
        self._parts = _parts(_choose(self._source, options)[0], options)
        self._out = out

    def write(self, shard: int) -> _ShardRecord:
        """Write tar, index and record of one shard, in this order, each atomically."""
        name = _shard_name(shard)
        offsets: list[int] = []
        lengths: list[int] = []
        labels: list[int] = []
        sizes: set[tuple[int, int]] = set()
        bad: list[str] = []
        with atomic_path(self._out / f"{name}.tar") as temporary:
            with temporary.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for index, label in self._parts[shard]:
                    try:
                        data = self._source.read(index)
                        height, width, _ = decode_rgb(data, name=self._source.keys[index]).shape
                    except DataError as error:
                        bad.append(str(error))
                        continue
                    sizes.add((width, height))
                    stem, suffix = _tar_name(self._source.keys[index])
                    offsets.append(_add(tar, f"{stem}{suffix}", data))
                    lengths.append(len(data))
                    labels.append(label)
                    _add(tar, f"{stem}.cls", str(label).encode())
            digest, tar_bytes = sha256_of(temporary), temporary.stat().st_size
        index_path = self._out / f"{name}.idx"
        write_index(index_path, offsets, lengths, labels, tar_bytes=tar_bytes, tar_sha256=digest)
        counts = {str(label): count for label, count in sorted(Counter(labels).items())}
        record = _ShardRecord(f"{name}.tar", len(offsets), tar_bytes, digest, sorted(sizes), counts, bad)
        write_json(_record_path(self._out, shard), asdict(record))
        return record


def _shard_name(shard: int) -> str:
    return f"shard-{shard:06d}"


def _tar_name(key: str) -> tuple[str, str]:
    """Sample key and suffix inside the tar; WebDataset ends a key at the first dot of the file name."""
    path = PurePosixPath(key)
    suffix = path.suffix.lower().replace(".jpeg", ".jpg")
    return str(path.parent / path.stem.replace(".", "_")), suffix


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append one member without owner or time; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    try:
        tar.addfile(member, io.BytesIO(data))
    except ValueError as error:
        raise DataError(
            f"{name!r} does not fit into a tar header ({error}); rename the image or its folder."
        ) from error
    return int(tar.offset) - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _record_path(out: Path, shard: int) -> Path:
    return out / _WORK_FOLDER / f"{_shard_name(shard)}.json"


def _finished(out: Path, shard: int) -> _ShardRecord | None:
    path = _record_path(out, shard)
    if not path.is_file():
        return None
    values = read_json(path)
    tar = out / values["name"]
    if not tar.with_suffix(".idx").is_file() or not tar.is_file() or tar.stat().st_size != values["bytes"]:
        return None
    values["sizes"] = [tuple(size) for size in values["sizes"]]
    return _ShardRecord(**values)


def _refuse_bad(records: Iterable[_ShardRecord], max_bad: int) -> None:
    bad = [message for record in records for message in record.bad]
    if len(bad) > max_bad:
        shown = "\n  ".join(bad[:5])
        raise DataError(
            f"{len(bad)} unreadable image(s), more than --max-bad {max_bad} allows:\n  {shown}\n"
            "Mend or remove them, or raise --max-bad to skip them."
        )


def _finish(
    source_path: Path, out: Path, options: PackOptions, names: Sequence[str], records: Sequence[_ShardRecord]
) -> Manifest:
    images: Counter[int] = Counter()
    for record in records:
        images.update({int(label): count for label, count in record.labels.items()})
    sizes = {size for record in records for size in record.sizes}
    written = [r for r in records if r.samples]
    if not written:
        raise DataError(f"{source_path}: no image could be decoded, nothing was packed.")
    manifest = Manifest(
        num_samples=sum(record.samples for record in written),
        num_classes=len(names),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        source=source_path.name,
        licence=options.licence,
        template=options.template,
        skipped=sum(len(record.bad) for record in records),
        shards=[ShardEntry(name=r.name, samples=r.samples, bytes=r.bytes, sha256=r.sha256) for r in written],
    )
    write_identities(out, [Identity(i, name, images[i]) for i, name in enumerate(names)])
    write_json(out / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest
