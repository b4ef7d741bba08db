"""Sources to WebDataset shards: deterministic bytes, one process per worker, resumable, each shard whole or absent.

The order of the images is fixed by a seeded permutation before any work is shared out, so the bytes do not depend on
the number of workers. While it runs, OUT/.packing holds the plan and one record per finished shard; a second run with
the same plan continues there, one with another plan is refused. The manifest is written last.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import read_json, write_csv, write_json
from aroface.locks import try_lock
from shards.duplicates import HASH_BYTES, Duplicates, find_duplicates, write_duplicates
from shards.image_table import ImageTable, TableBuilder
from shards.manifest import MANIFEST_NAME, Identity, Manifest, ShardEntry, write_identities
from shards.pack_worker import (
    ROWS_PER_HASH_TASK,
    Job,
    PackWorker,
    ShardRecord,
    finished_record,
    run_tasks,
    scratch_of,
)
from shards.prepare import Preparation
from shards.selection import Part, Selection, merged_names, select
from shards.shard_writer import shard_name
from shards.sources import SourceOptions, open_source

__all__ = ["IDENTITY_MAP_NAME", "SKIPPED_NAME", "PackOptions", "pack", "read_table"]

IDENTITY_MAP_NAME = "identity_map.csv"
SKIPPED_NAME = "skipped.csv"

_WORK_FOLDER = ".packing"

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PackOptions:
    """What shapes the shards. Equal options and an equal source give equal bytes."""

    samples_per_shard: int = 8192
    min_images: int = 1  #: identities with fewer images are left out
    max_bad: int = 0  #: unreadable images that may be skipped
    identities: tuple[str, ...] | None = None  #: only these; None keeps all
    holdout: int = 0  #: identities that are set aside
    part: Part = "rest"  #: which side of the holdout is packed
    merges: Mapping[str, str] = field(default_factory=dict)  #: identity -> person
    duplicates: Literal["report", "drop"] = "report"  #: what happens to equal files
    preparation: Preparation = field(default_factory=Preparation)
    landmarks: Mapping[str, Sequence[float]] = field(default_factory=dict)  #: key -> x and y of five points
    source: SourceOptions = field(default_factory=SourceOptions)
    licence: str = "unknown"
    template: Literal["arcface_112"] = "arcface_112"  #: what the faces are aligned to; noted, not checked


def pack(
    source_paths: Path | Sequence[Path],
    out: Path,
    options: PackOptions,
    *,
    workers: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Pack one or several sources into a shard directory.

    The identities of several sources are kept apart by the name of their source; `options.merges` joins them.

    Args:
        source_paths: see `shards.sources`.
        out: new directory, or one that a killed run with the same plan left behind.
        options: what shapes the result.
        workers: processes; does not change the result.
        progress: called with (`Hash` or `Pack`, images done, images in all) after each piece of work.

    Raises:
        DataError: nothing to pack, too many unreadable images, `out` belongs to something else or to another packer.
    """
    paths = (source_paths,) if isinstance(source_paths, Path) else tuple(source_paths)
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out} already holds finished shards. Name another directory, or remove it first.")
    _check_counts(options, workers)
    _refuse_foreign(out)
    with _only_packer(out):
        work = out / _WORK_FOLDER
        table = read_table(paths, options.source, landmarks=options.landmarks, scratch=work / "scratch")
        people = merged_names(table, dict(options.merges))
        _adopt(out, _plan(paths, table, people, options))
        job = Job(paths, options.source, out, work, options.samples_per_shard, options.preparation)
        table.save(work / "table")
        table = ImageTable.load(work / "table")  # the same columns, in memory that the system may take back
        found = _hash_all(job, table, people, workers, progress) if options.duplicates == "drop" else None
        selection = select(
            table,
            people,
            dropped=found.rows_to_drop() if found else None,
            min_images=options.min_images,
            only=options.identities,
            holdout=options.holdout,
            part=options.part,
        )
        np.save(work / "rows.npy", selection.rows, allow_pickle=False)
        np.save(work / "labels.npy", selection.label_of_identity, allow_pickle=False)
        records = _run(job, options, len(selection.rows), workers, progress)
        if found is None:
            found = _duplicates_of_records(work, table, selection, len(records))
        manifest = _finish(out, paths, options, table, people, selection, records, found)
        shutil.rmtree(work)
    return manifest


def read_table(
    paths: Sequence[Path],
    options: SourceOptions | None = None,
    *,
    landmarks: Mapping[str, Sequence[float]] | None = None,
    scratch: Path | None = None,
) -> ImageTable:
    """List all images of the sources.

    Args:
        paths: sources; the identities of more than one get the name of their source in front.
        options: of their layout.
        landmarks: key -> ten numbers, in place of what the sources tell.
        scratch: folder for unpacked copies, see `shards.sources.open_source`.

    Raises:
        DataError: a source is damaged, or two of them have one name.
    """
    names = [path.name.partition(".")[0] for path in paths]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if len(paths) > 1 and twice is not None:
        raise DataError(f"Two sources are called {twice!r}, so their identities cannot be told apart; rename one.")
    builder = TableBuilder()
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        source = open_source(path, options, scratch=scratch_of(scratch, number))
        builder.add(source.entries(), source=number, prefix=f"{name}/" if len(paths) > 1 else "")
    table = builder.finish(what=", ".join(str(path) for path in paths))
    return table.with_landmarks(landmarks) if landmarks else table


def _plan(paths: Sequence[Path], table: ImageTable, people: Sequence[str], options: PackOptions) -> dict[str, object]:
    # Raising the tolerance continues the same plan; landmarks are part of the table, merges of the people.
    shaping = asdict(replace(options, max_bad=0, landmarks={}, merges={}))
    choice = sha256(json.dumps([list(people), shaping], default=str).encode("utf-8", "surrogateescape")).hexdigest()
    return {"sources": [path.name for path in paths], "images": table.fingerprint(), "choice": choice}


@contextmanager
def _only_packer(out: Path) -> Iterator[None]:
    """Hold the lock of the output directory; one that an error ends before its first piece of work leaves nothing."""
    work = out / _WORK_FOLDER
    absent = [folder for folder in (work, *work.parents) if not folder.exists()]
    work.mkdir(parents=True, exist_ok=True)
    with try_lock(work / "lock") as lock:
        if not lock.is_mine:
            raise DataError(
                f"Another process is packing into {out} ({lock.holder}); wait for it, or name another directory."
            )
        try:
            yield
        except DataError:
            if work in absent and not any(work.glob("shard-*")) and not any(work.glob("hashes-*")):
                _remove(work, absent[1:])
            raise


def _remove(work: Path, parents: Sequence[Path]) -> None:
    shutil.rmtree(work)
    for folder in parents:
        with suppress(OSError):  # somebody else has put something there meanwhile
            folder.rmdir()


def _adopt(out: Path, plan: dict[str, object]) -> None:
    """Start a new plan, or continue the unfinished one that is there; to be called under the lock."""
    if (out / MANIFEST_NAME).exists():
        raise DataError(f"{out} was finished by another process just now. Name another directory.")
    path = out / _WORK_FOLDER / "plan.json"
    if not path.is_file():
        write_json(path, plan)
        return
    if read_json(path) != plan:
        raise DataError(
            f"{out} holds an unfinished packing of another source or with other options. "
            "Repeat the command that started it, name another directory, or remove this one."
        )
    logger.info("Continuing the unfinished packing in %s.", out)
    for leftover in [*out.glob(".shard-*.tmp"), *(out / _WORK_FOLDER).glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)  # of a file that was being written when the run was killed


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
        ("--holdout", options.holdout, 0),
        ("--workers", workers, 1),
    ):
        if value < least:
            raise DataError(f"{setting} is {value}; it must be {least} or more.")


def _hash_all(job: Job, table: ImageTable, people: Sequence[str], workers: int, progress: Progress) -> Duplicates:
    """Hash every image of the table before any is chosen."""
    tasks = range(-(-len(table) // ROWS_PER_HASH_TASK))
    done = 0
    for _, hashed in run_tasks(job, PackWorker.hash, tasks, workers=workers):
        done += hashed
        progress("Hash", done, len(table))
    hashes = np.concatenate([np.load(job.work / f"hashes-{task:06d}.npy", allow_pickle=False) for task in tasks])
    return find_duplicates(np.arange(len(table)), hashes, _person_codes(people)[table.identity])


def _person_codes(people: Sequence[str]) -> NDArray[np.int32]:
    return np.unique(np.array(people), return_inverse=True)[1].astype(np.int32)


def _duplicates_of_records(work: Path, table: ImageTable, selection: Selection, shards: int) -> Duplicates:
    """Duplicates among the images that were written, from the hashes that the workers left."""
    rows = np.empty(len(selection.rows), np.int64)
    hashes = np.empty((len(rows), HASH_BYTES), np.uint8)
    start = 0
    for name in map(shard_name, range(shards)):
        own = np.load(work / f"{name}.rows.npy", allow_pickle=False)
        rows[start : start + len(own)] = own
        hashes[start : start + len(own)] = np.load(work / f"{name}.hashes.npy", allow_pickle=False)
        start += len(own)
    return find_duplicates(rows, hashes, selection.label_of_identity[table.identity[rows]])


def _run(job: Job, options: PackOptions, total: int, workers: int, progress: Progress) -> list[ShardRecord]:
    count = -(-total // options.samples_per_shard)
    records = {i: record for i in range(count) if (record := finished_record(job, i))}
    todo = [i for i in range(count) if i not in records]
    done = sum(record.samples + len(record.bad) for record in records.values())
    _refuse_bad(records.values(), options.max_bad)
    progress("Pack", done, total)
    for index, record in run_tasks(job, PackWorker.write, todo, workers=workers):
        records[index] = record
        done += record.samples + len(record.bad)
        progress("Pack", done, total)
        for *_, reason in record.bad:
            logger.warning("Unreadable: %s", reason)
        _refuse_bad(records.values(), options.max_bad)
    return [records[i] for i in range(count)]


def _refuse_bad(records: Iterable[ShardRecord], max_bad: int) -> None:
    bad = [reason for record in records for *_, reason in record.bad]
    if len(bad) > max_bad:
        shown = "\n  ".join(bad[:5])
        raise DataError(
            f"{len(bad)} unreadable image(s), more than --max-bad {max_bad} allows:\n  {shown}\n"
            "Mend or remove them, or raise --max-bad to skip them."
        )


def _finish(
    out: Path,
    paths: Sequence[Path],
    options: PackOptions,
    table: ImageTable,
    people: Sequence[str],
    selection: Selection,
    records: Sequence[ShardRecord],
    found: Duplicates,
) -> Manifest:
    """Write the lists beside the shards, the manifest last."""
    written = [record for record in records if record.samples]
    source = ", ".join(path.name for path in paths)
    if not written:
        raise DataError(f"{source}: no image could be decoded, nothing was packed.")
    bad = [entry for record in records for entry in record.bad]
    if bad:
        write_csv(out / SKIPPED_NAME, ("image", "reason"), sorted(entry[1:] for entry in bad))
    images = _images_per_class(table, selection, [row for row, *_ in bad])
    if found.groups:
        write_duplicates(out, table, people, found, drop=options.duplicates == "drop")
    if len(paths) > 1 or options.merges:
        rows = [
            (int(label), identity, paths[_source_of(table, number)].name)
            for number, (identity, label) in enumerate(zip(table.identities, selection.label_of_identity, strict=True))
            if label >= 0
        ]
        write_csv(out / IDENTITY_MAP_NAME, ("class_index", "identity", "source"), sorted(rows))
    sizes = {size for record in records for size in record.sizes}
    identities = [Identity(i, name, count) for i, (name, count) in enumerate(zip(selection.names, images, strict=True))]
    manifest = Manifest(
        num_samples=sum(record.samples for record in written),
        num_classes=len(selection.names),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        source=source,
        licence=options.licence,
        template=options.template,
        aligned_by=("given landmarks" if options.landmarks else "the list") if options.preparation.align else None,
        skipped=len(bad),
        identities_sha256=write_identities(out, identities),
        duplicates=found.num_surplus,
        conflicts=found.num_conflicts,
        shards=[ShardEntry(name=r.name, samples=r.samples, bytes=r.bytes, sha256=r.sha256) for r in written],
    )
    write_json(out / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def _images_per_class(table: ImageTable, selection: Selection, left_out: Sequence[int]) -> list[int]:
    classes = len(selection.names)
    chosen, dropped = (selection.label_of_identity[table.identity[rows]] for rows in (selection.rows, list(left_out)))
    counts: list[int] = (np.bincount(chosen, minlength=classes) - np.bincount(dropped, minlength=classes)).tolist()
    return counts


def _source_of(table: ImageTable, identity: int) -> int:
    """Index of the source of an identity; identities of several sources are distinct."""
    first = int(np.searchsorted(table.identity, identity))
    return table.parts[int(table.part[first])][0]
