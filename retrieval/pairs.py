"""Lists of pairs to compare."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError

__all__ = ["read_index_pairs"]

_HEADER = "index_a,index_b,label"


def read_index_pairs(path: Path, *, num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Read a CSV with the header `index_a,index_b,label`.

    Args:
        path: the file.
        num_rows: rows of the embedding file that the indices point into.

    Returns:
        (P,) first row, (P,) second row, (P,) True for genuine.

    Raises:
        DataError: missing, another header, a malformed line, an index out of range, or no pair at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    header, _, body = text.partition("\n")
    if header.replace(" ", "").strip() != _HEADER:
        raise DataError(f"{path} begins with {header.strip()!r}; a pair list begins with {_HEADER!r}.")
    try:
        rows = np.array([line.split(",") for line in body.splitlines() if line.strip()], np.int64)
    except (ValueError, OverflowError) as error:
        raise _malformed(path, body) from error
    if rows.ndim != 2:
        raise DataError(f"{path} lists no pairs.")
    if rows.shape[1] != 3:
        raise _malformed(path, body)
    outside = (rows[:, :2] < 0).any(1) | (rows[:, :2] >= num_rows).any(1) | ~np.isin(rows[:, 2], (0, 1))
    if outside.any():
        first = int(outside.argmax())
        raise DataError(
            f"{path}: pair {first + 1} is {','.join(map(str, rows[first]))}; indices must be 0 to "
            f"{num_rows - 1} and the label 0 or 1."
        )
    return rows[:, 0], rows[:, 1], rows[:, 2] == 1


def _malformed(path: Path, body: str) -> DataError:
    for number, line in enumerate(body.splitlines(), start=2):
        parts = line.split(",")
        if line.strip() and (len(parts) != 3 or not all(map(_is_whole, parts))):
            return DataError(
                f"{path}, line {number}: {line!r} is not index_a,index_b,label in whole numbers, of 64 bits at most."
            )
    return DataError(f"{path} is not a list of index_a,index_b,label.")


def _is_whole(text: str) -> bool:
    try:
        return abs(int(text)) < 1 << 63
    except ValueError:
        return False
