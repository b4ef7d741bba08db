"""What is to be enrolled, on its way into segments."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery.segments import Batch, Entries, Segment
from retrieval.gallery.store import Manifest, check_new, is_gallery, read_manifest
from retrieval.gallery.vectors import as_unit, check_embeddings, check_ids, lengths

__all__ = ["Part", "batch_of", "batches_of", "check_part", "opened", "part_of", "replaced"]


@dataclass(frozen=True)
class Part:
    """Embeddings with their ids, as they were given."""

    embeddings: NDArray[np.floating[Any]]  #: (n, D) of any length
    subject_ids: ArrayLike  #: (n,)
    entry_ids: ArrayLike | None  #: (n,); None: their numbers


def part_of(embeddings: EmbeddingSet) -> Part:
    """A set whose keys are the entry ids."""
    return Part(embeddings.embeddings, embeddings.subject_ids, embeddings.keys)


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
    """Every part as a batch; entries without an id are named by their number.

    Raises:
        DataError: a row without direction, another dimension than the first, an id that repeats within a part.
    """
    number = 0
    for part in _chained(first, others):
        check_embeddings(part.embeddings, dimension)
        count = len(part.embeddings)
        names = np.arange(number, number + count) if part.entry_ids is None else part.entry_ids
        subjects, names = check_ids(part.subject_ids, names, count, ())
        yield batch_of(part.embeddings, subjects, names, number)
        number += count


def _chained(first: Part, others: Iterable[Part]) -> Iterator[Part]:
    yield first
    yield from others


def replaced(directory: Path, replace: bool) -> Manifest | None:
    """The manifest of the gallery whose place a new one takes.

    Raises:
        DataError: there is one and it should stay, or the directory holds something else.
    """
    if not is_gallery(directory):
        check_new(directory)
        return None
    if not replace:
        raise DataError(f"Gallery {directory} exists already. Add to it, name another one, or replace it (--replace).")
    return read_manifest(directory)


def opened(directory: Path, manifest: Manifest, known: Sequence[Segment] = ()) -> tuple[Manifest, tuple[Segment, ...]]:
    """A state that has been written and not yet committed."""
    before = {segment.record: segment for segment in known}
    segments = (
        before.get(record) or Segment.open(directory, record, manifest.dimension, verify=False)
        for record in manifest.segments
    )
    return manifest, tuple(segments)
