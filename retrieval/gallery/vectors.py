"""Checks and normalisation of embeddings on their way into a gallery or a search."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.errors import DataError, ShapeError

__all__ = ["EnrolledIdError", "as_unit", "check_embeddings", "check_ids", "lengths", "listed", "unit_blocks"]

_BLOCK_ROWS = 1 << 7  # in float64 they stay in the cache
_NAMED_ROWS = 5


class EnrolledIdError(DataError):
    """An entry id that was to be enrolled is enrolled already."""


def check_embeddings(embeddings: NDArray[Any], dimension: int | None) -> None:
    """Refuse anything but (N, D) floats, each row with a direction.

    Raises:
        ShapeError: another shape or type.
        DataError: another dimension than `dimension`, or rows that are zero or not finite.
    """
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise ShapeError(f"Embeddings are {embeddings.dtype} {embeddings.shape}; float (N, D) is needed.")
    if dimension is not None and embeddings.shape[1] != dimension:
        raise DataError(
            f"The embeddings have {embeddings.shape[1]} dimensions, the gallery has {dimension}; embed with its model."
        )
    norms = lengths(embeddings)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0))).tolist()
    if bad:
        raise DataError(
            f"Rows {listed(bad)} of the embeddings have no direction (zero, NaN or infinite). Leave them out: a face "
            "that failed to enrol has no embedding."
        )


def check_ids(
    subject_ids: ArrayLike, entry_ids: ArrayLike, count: int, taken: Collection[str]
) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Subject ids and entry ids as text.

    Args:
        subject_ids: one for each embedding.
        entry_ids: one for each embedding.
        count: embeddings.
        taken: entry ids that are enrolled and may not be given again.

    Raises:
        ShapeError: another number of ids.
        DataError: an entry id that repeats.
        EnrolledIdError: one that is taken.
    """
    subjects, names = _as_text(subject_ids), _as_text(entry_ids)
    for what, values in (("subject ids", subjects), ("entry ids", names)):
        if values.shape != (count,):
            raise ShapeError(f"{values.shape} {what} for {count} embeddings; one for each is needed.")
    unique, counts = np.unique(names, return_counts=True)
    repeated = unique[counts > 1].tolist()
    if repeated:
        raise DataError(
            f"Entry ids {listed(repeated)} occur more than once in the input; an entry id names one entry. Give each "
            "entry an id of its own, or leave out those that are given twice."
        )
    if taken:
        raise EnrolledIdError(
            f"Entry ids {listed(sorted(taken))} are enrolled already; an entry id names one entry. Replace them "
            "(--upsert), remove them first, or give the new ones other ids."
        )
    return subjects, names


def _as_text(ids: ArrayLike) -> NDArray[np.str_]:
    """Ids as text no wider than the longest of them; whole numbers would take 21 characters each."""
    text = np.asarray(ids).astype(np.str_)
    return text.astype(f"U{max(1, int(np.strings.str_len(text).max(initial=1)))}")


def lengths(embeddings: NDArray[Any]) -> NDArray[np.float64]:
    """(N,) Euclidean lengths."""
    norms = [np.sqrt(np.vecdot(block, block, dtype=np.float64)) for block in _blocks(embeddings)]
    return np.concatenate([np.zeros(0), *norms])


def unit_blocks(embeddings: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """The rows scaled to length 1, some hundred at a time."""
    for block in _blocks(embeddings):
        yield (block / lengths(block)[:, None]).astype(np.float32)


def as_unit(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    """(N, D) rows scaled to length 1."""
    unit = np.empty(embeddings.shape, np.float32)
    start = 0
    for block in unit_blocks(embeddings):
        unit[start : start + len(block)] = block
        start += len(block)
    return unit


def _blocks(embeddings: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        yield embeddings[start : start + _BLOCK_ROWS]


def listed(values: Sequence[object]) -> str:
    """The first values, and how many more there are."""
    named = ", ".join(map(str, values[:_NAMED_ROWS]))
    return named if len(values) <= _NAMED_ROWS else f"{named} and {len(values) - _NAMED_ROWS} more"
