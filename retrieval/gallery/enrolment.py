"""What is to be enrolled, on its way into segments."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import segments
from retrieval.gallery.segments import Batch, Entries, Segment
from retrieval.gallery.store import Manifest, check_new, files_of_unknown_state, is_gallery, read_manifest
from retrieval.gallery.vectors import as_unit, check_embeddings, check_ids, lengths, listed

__all__ = [
    "Part",
    "batch_of",
    "batches_of",
    "check_part",
    "counted",
    "enrolled_rows",
    "free_names",
    "more_subjects",
    "opened",
    "parts_of",
    "replaced",
]


@dataclass(frozen=True)
class Part:
    """Embeddings with their ids, as they were given."""

    embeddings: NDArray[np.floating[Any]]  #: (n, D) of any length
    subject_ids: ArrayLike  #: (n,)
    entry_ids: ArrayLike | None  #: (n,); None: their numbers


def parts_of(embeddings: EmbeddingSet) -> Iterator[Part]:
    """The rows of a set that are enrolled, its keys as entry ids; copied a segment at a time."""
    for start in range(0, len(embeddings), segments.SEGMENT_ROWS):
        rows = start + np.flatnonzero(embeddings.enrolled[start : start + segments.SEGMENT_ROWS])
        if len(rows):
            keys = None if embeddings.keys is None else embeddings.keys[rows]
            yield Part(embeddings.embeddings[rows], embeddings.subject_ids[rows], keys)


def check_part(part: Part, taken: Collection[str]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Subject ids and entry ids as text; `taken` are ids that are enrolled already.

    Raises:
        ShapeError: another number of ids than of embeddings.
        DataError: an id that repeats or is taken.
    """
    count = len(part.embeddings)
    return check_ids(part.subject_ids, np.arange(count) if part.entry_ids is None else part.entry_ids, count, taken)


def batch_of(
    embeddings: NDArray[np.floating[Any]], subjects: NDArray[np.str_], names: NDArray[np.str_], number: int
) -> Batch:
    """Unit vectors with their entries, numbered from `number` on."""
    norms = lengths(embeddings).astype(np.float32)
    entries = Entries(names, subjects, norms, np.arange(number, number + len(names), dtype=np.int64))
    return Batch(as_unit(embeddings), entries)


def batches_of(first: Part, others: Iterable[Part], dimension: int) -> Iterator[Batch]:
    """Every part in batches of at most a segment; entries without an id are named by their number.

    Raises:
        DataError: a row without direction, another dimension than the first, an id that repeats within a part.
    """
    number = 0
    for part in _chained(first, others):
        check_embeddings(part.embeddings, dimension)
        count = len(part.embeddings)
        names = np.arange(number, number + count) if part.entry_ids is None else part.entry_ids
        subjects, names = check_ids(part.subject_ids, names, count, ())
        for start in range(0, count, segments.SEGMENT_ROWS):
            rows = slice(start, start + segments.SEGMENT_ROWS)
            yield batch_of(part.embeddings[rows], subjects[rows], names[rows], number + start)
        number += count


def _chained(first: Part, others: Iterable[Part]) -> Iterator[Part]:
    yield first
    yield from others


def replaced(directory: Path, replace: bool) -> tuple[int, set[str]]:
    """The generation of a new gallery in a directory, and the files that stay until it is whole.

    Raises:
        DataError: there is a gallery and it should stay, or the directory holds something else.
    """
    if not is_gallery(directory):
        check_new(directory)
        return 1, set()
    if not replace:
        raise DataError(f"Gallery {directory} exists already. Add to it, name another one, or replace it (--replace).")
    try:
        old = read_manifest(directory)
    except DataError:  # damaged: which files are valid is unknown, so all of them stay
        newest, names = files_of_unknown_state(directory)
        return newest + 1, names
    return old.generation + 1, old.file_names


def opened(directory: Path, manifest: Manifest, known: Sequence[Segment] = ()) -> tuple[Manifest, tuple[Segment, ...]]:
    """A state that has been written and not yet committed."""
    before = {segment.record: segment for segment in known}
    opened_segments = (
        before.get(record) or Segment.open(directory, record, manifest.dimension, verify=False)
        for record in manifest.segments
    )
    return manifest, tuple(opened_segments)


def counted(manifest: Manifest, entries: Entries) -> Manifest:
    """The manifest with the counts of freshly written segments, whose entry ids are compared with one another.

    Raises:
        DataError: an id that repeats.
    """
    check_ids(entries.subject_ids, entries.entry_ids, len(entries), ())
    subjects = len(np.unique(entries.subject_ids))
    return manifest.model_copy(update={"count": len(entries), "num_subjects": subjects, "next_number": len(entries)})


def free_names(entries: Entries, next_number: int, count: int) -> list[str]:
    """Numbers as names for `count` new entries, none of which is enrolled."""
    start = next_number
    names = [str(number) for number in range(start, start + count)]
    if np.isin(entries.entry_ids, names).any():
        start = max((int(name) + 1 for name in entries.entry_ids.tolist() if name.isdecimal()), default=0)
        names = [str(number) for number in range(start, start + count)]
    return names


def enrolled_rows(
    directory: Path, entries: Entries, entry_ids: Collection[str], subject_ids: Collection[str]
) -> NDArray[np.bool_]:
    """(N,) rows of the given entries, and of all entries of the given subjects.

    Raises:
        DataError: an id that is not enrolled.
    """
    rows = np.zeros(len(entries), bool)
    for what, ids, enrolled in (
        ("entry", entry_ids, entries.entry_ids),
        ("subject", subject_ids, entries.subject_ids),
    ):
        wanted = sorted({str(value) for value in ids})
        if not wanted:
            continue
        found = np.isin(enrolled, wanted)
        missing = sorted(set(wanted) - set(enrolled[found].tolist()))
        if missing:
            raise DataError(
                f"Gallery {directory} has no {what} {listed(missing)}; `aroface gallery info --entries` lists them."
            )
        rows |= found
    return rows


def more_subjects(subjects: NDArray[np.str_], drop: NDArray[np.bool_] | None, new: Batch | None) -> int:
    """How many subjects a change brings to those of the (N,) entries, less those it takes away."""
    added = new.entries.subject_ids if new else subjects[:0]
    left = subjects if drop is None else subjects[~drop]
    gone = subjects[:0] if drop is None else subjects[drop]
    affected = np.unique(np.concatenate([added, gone]))
    before = np.unique(subjects[np.isin(subjects, affected)])
    after = np.union1d(left[np.isin(left, affected)], added)
    return len(after) - len(before)
