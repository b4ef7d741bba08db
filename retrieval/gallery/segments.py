"""Segments: the entries of a gallery in pieces of bounded size, written once and read through the memory map.

A change writes new segments and keeps the untouched ones: enrolling a few faces costs a few faces, and what is removed
leaves the disk at once, with the segments that held it. A new segment takes in smaller ones before it, so that their
number stays near the logarithm of the number of changes.
"""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path
from retrieval.gallery.store import RESTORE, Manifest, SegmentRecord, check_file, read_manifest, record_of

__all__ = [
    "SEGMENT_ROWS",
    "Batch",
    "Entries",
    "Rows",
    "Segment",
    "next_segments",
    "read_state",
    "shared_entries",
    "write_segments",
]

#: Entries in a segment at most: 64 MiB at D = 512, the memory of a writer and the price of removing one entry.
SEGMENT_ROWS = 1 << 15
_COLUMNS = ("entry_ids", "subject_ids", "norms", "numbers")


@dataclass(frozen=True)
class Entries:
    """Who is enrolled, one row per embedding."""

    entry_ids: NDArray[np.str_]  #: (N,) unique
    subject_ids: NDArray[np.str_]  #: (N,)
    norms: NDArray[np.float32]  #: (N,) length of each embedding before it was normalised
    numbers: NDArray[np.int64]  #: (N,) ascending in the order of enrolment

    def __len__(self) -> int:
        """N."""
        return len(self.entry_ids)

    def take(self, rows: NDArray[Any] | slice) -> "Entries":
        """The given rows (indices, mask or slice)."""
        return Entries(*(getattr(self, name)[rows] for name in _COLUMNS))

    @staticmethod
    def concatenated(parts: Sequence["Entries"]) -> "Entries":
        """Entries of several parts, one after the other."""
        if not parts:
            return Entries(np.zeros(0, "U1"), np.zeros(0, "U1"), np.zeros(0, np.float32), np.zeros(0, np.int64))
        if len(parts) == 1:
            return parts[0]
        return Entries(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


@dataclass(frozen=True)
class Batch:
    """Unit vectors with their entries, on their way into a segment."""

    embeddings: NDArray[np.float32]  #: (n, D) unit length
    entries: Entries


@dataclass(frozen=True)
class Segment:
    """One segment, opened."""

    directory: Path
    record: SegmentRecord
    embeddings: NDArray[np.float32]  #: (rows, D), memory-mapped
    entries: Entries

    @classmethod
    def open(cls, directory: Path, record: SegmentRecord, dimension: int, *, verify: bool) -> "Segment":
        """Open a segment.

        Raises:
            DataError: damaged, or not what the record says.
            FileNotFoundError: it has been deleted.
        """
        embeddings_path = check_file(directory, record.embeddings, verify=verify)
        entries_path = check_file(directory, record.entries, verify=verify)
        try:
            embeddings: NDArray[np.float32] = np.load(embeddings_path, mmap_mode="r")
            with np.load(entries_path, allow_pickle=False) as arrays:
                entries = Entries(*(arrays[name] for name in _COLUMNS))
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise DataError(f"Gallery {directory} cannot be read: {error}. {RESTORE}") from error
        shape = (record.rows, dimension)
        if embeddings.shape != shape or embeddings.dtype != np.float32 or len(entries) != record.rows:
            raise DataError(
                f"{embeddings_path} holds {embeddings.dtype} {embeddings.shape} embeddings and {len(entries)} entries, "
                f"where the manifest says float32 {shape}. {RESTORE}"
            )
        return cls(directory, record, embeddings, entries)

    def kept(self, keep: NDArray[np.bool_]) -> Iterator[Batch]:
        """The rows of the mask, for a segment that replaces this one; the checksums are compared first."""
        check_file(self.directory, self.record.embeddings, verify=True)
        check_file(self.directory, self.record.entries, verify=True)
        yield Batch(self.embeddings if keep.all() else self.embeddings[keep], self.entries.take(keep))


class Rows:
    """The rows of several segments as one (N, D) array that is never put together."""

    def __init__(self, parts: Sequence[NDArray[np.float32]], dimension: int) -> None:
        self.parts = [
            np.asarray(part) for part in parts
        ]  # slices of a memmap object are slow, those of its memory are not
        self.dimension = dimension
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        """N."""
        return int(self.starts[-1])

    def from_row(self, row: int) -> "Rows":
        """The rows from `row` on."""
        parts = [part[max(0, row - start) :] for part, start in zip(self.parts, self.starts, strict=False)]
        return Rows([part for part in parts if len(part)], self.dimension)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(..., D) vectors of the given rows, whatever the shape of `rows`."""
        flat = rows.ravel()
        out = np.empty((len(flat), self.dimension), np.float32)
        place = np.searchsorted(self.starts, flat, side="right") - 1
        for part in np.unique(place):
            chosen = np.flatnonzero(place == part)
            out[chosen] = self.parts[part][flat[chosen] - self.starts[part]]
        return out.reshape(*rows.shape, self.dimension)

    def blocks(self, size: int) -> Iterator[NDArray[np.float32]]:
        """All rows in order, at most `size` at a time."""
        for part in self.parts:
            for start in range(0, len(part), size):
                yield part[start : start + size]

    @cached_property
    def whole(self) -> NDArray[np.float32]:
        """All rows as one array: the memory map of the only segment, or a copy of several."""
        if len(self.parts) == 1:
            return self.parts[0]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *self.parts])


def shared_entries(segments: Sequence[Segment]) -> tuple[Entries, tuple[Segment, ...]]:
    """All entries as one, and the segments with views of them in the place of copies."""
    whole = Entries.concatenated([segment.entries for segment in segments])
    starts = np.cumsum([0, *(segment.record.rows for segment in segments)]).tolist()
    views = (
        replace(segment, entries=whole.take(slice(start, start + segment.record.rows)))
        for segment, start in zip(segments, starts, strict=False)
    )
    return whole, tuple(views)


def read_state(
    directory: Path, *, verify: bool, opened: Sequence[Segment] = ()
) -> tuple[Manifest, tuple[Segment, ...]]:
    """One whole state.

    Args:
        directory: of the gallery.
        verify: compare the checksums, which reads every byte once.
        opened: segments of an earlier state; those still valid are taken over as they are.

    Raises:
        DataError: missing, damaged, or not what the manifest says.
    """
    known = {segment.record: segment for segment in opened}
    manifest = read_manifest(directory)
    while True:
        try:
            segments = tuple(
                known.get(record) or Segment.open(directory, record, manifest.dimension, verify=verify)
                for record in manifest.segments
            )
            if manifest.index_record:
                check_file(directory, manifest.index_record.file, verify=verify)
                check_file(directory, manifest.index_record.indexed, verify=verify)
            return manifest, segments
        except FileNotFoundError as error:
            newer = read_manifest(directory)
            if newer.generation == manifest.generation:
                raise DataError(f"Gallery {directory}: {error.filename} is missing. {RESTORE}") from error
            manifest = newer


def write_segments(directory: Path, generation: int, first: int, batches: Iterable[Batch]) -> list[SegmentRecord]:
    """Write batches of any size as segments of `SEGMENT_ROWS` entries, the last one shorter.

    Args:
        directory: of the gallery.
        generation: that will name them.
        first: number of the first segment in the file names.
        batches: at least one row together; the memory is that of one segment and one batch.
    """
    records: list[SegmentRecord] = []
    for batch in _filled(batches, SEGMENT_ROWS):
        suffix = f"{generation:08d}-{first + len(records):04d}"
        embeddings_path = directory / f"embeddings-{suffix}.npy"
        entries_path = directory / f"entries-{suffix}.npz"
        with atomic_path(embeddings_path) as temporary, temporary.open("wb") as file:
            np.save(file, np.ascontiguousarray(batch.embeddings, "<f4"), allow_pickle=False)
        with atomic_path(entries_path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: getattr(batch.entries, name) for name in _COLUMNS})
        records.append(
            SegmentRecord(
                rows=len(batch.entries), embeddings=record_of(embeddings_path), entries=record_of(entries_path)
            )
        )
    return records


def _filled(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same rows, `size` at a time."""
    pending: list[Batch] = []
    count = 0
    for batch in batches:
        start = 0
        while start < len(batch.entries):
            piece = slice(start, start + size - count)
            pending.append(Batch(batch.embeddings[piece], batch.entries.take(piece)))
            count += len(pending[-1].entries)
            start += len(pending[-1].entries)
            if count == size:
                yield _joined(pending)
                pending, count = [], 0
    if pending:
        yield _joined(pending)


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(
        np.concatenate([batch.embeddings for batch in batches]),
        Entries.concatenated([batch.entries for batch in batches]),
    )


def next_segments(
    directory: Path,
    generation: int,
    old: Sequence[Segment],
    *,
    drop: NDArray[np.bool_] | None = None,
    new: Batch | None = None,
    merge_all: bool = False,
) -> tuple[SegmentRecord, ...]:
    """Write what a change needs, and return the segments of the next state.

    Args:
        directory: of the gallery.
        generation: of the next state.
        old: segments of the present state.
        drop: (N,) rows to leave out.
        new: entries to append.
        merge_all: rewrite everything behind the first segment that is not full.
    """
    starts = np.concatenate([[0], np.cumsum([segment.record.rows for segment in old])]).astype(int)
    keeps = [
        np.ones(segment.record.rows, bool) if drop is None else ~drop[start : start + segment.record.rows]
        for segment, start in zip(old, starts, strict=False)
    ]
    rows = [int(keep.sum()) for keep in keeps]
    tail = _first_not_full(rows) if merge_all else _first_merged(rows, len(new.entries) if new else 0)
    records: list[SegmentRecord] = []
    written = 0
    for segment, keep in zip(old[:tail], keeps, strict=False):
        if keep.all():
            records.append(segment.record)
        elif keep.any():
            made = write_segments(directory, generation, written, segment.kept(keep))
            written += len(made)
            records.extend(made)

    def appended() -> Iterator[Batch]:
        for segment, keep in zip(old[tail:], keeps[tail:], strict=True):
            yield from segment.kept(keep)
        if new is not None:
            yield new

    return (*records, *write_segments(directory, generation, written, appended()))


def _first_merged(rows: Sequence[int], new_rows: int) -> int:
    """Segments from here on are written again with the new rows: those that are no larger than what follows them."""
    first, total = len(rows), new_rows
    while first and new_rows and rows[first - 1] <= total and rows[first - 1] + total <= SEGMENT_ROWS:
        first -= 1
        total += rows[first]
    return first


def _first_not_full(rows: Sequence[int]) -> int:
    return next((place for place, count in enumerate(rows) if count != SEGMENT_ROWS), len(rows))
