"""Tables as text: whole numbers by the million, and CSV files whose columns have names."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError

__all__ = ["as_ids", "matlab_cells", "read_columns", "read_integers", "read_lines"]

_CHECKED_BYTES = 1 << 24


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without line ends; empty lines are left out.

    Raises:
        DataError: missing, or not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_integers(path: Path, *, columns: int, what: str) -> NDArray[np.int32]:
    """A file of whole numbers between white space or commas, without a header.

    Args:
        path: the file.
        columns: numbers per line.
        what: what a line is, for messages.

    Returns:
        (rows, columns).

    Raises:
        DataError: missing, empty, a line of another length, or anything but whole numbers.
    """
    try:
        data = path.read_bytes().replace(b",", b" ").replace(b"\r", b" ")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # numpy's way to say that something was no number
        try:
            values = np.fromstring(data.decode("ascii"), np.int64, sep=" ")
        except (DeprecationWarning, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise _malformed(path, columns, what) from error
    if not len(values):
        raise DataError(f"{path} is empty; each line is {what}.")
    if len(values) % columns or not _every_line_has(data, columns):
        raise _malformed(path, columns, what)
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        wrong = values[(values < limits.min) | (values > limits.max)][0]
        raise DataError(f"{path}: {wrong} is too large; {what} are numbers of 32 bits.")
    return values.reshape(-1, columns).astype(np.int32)


def _every_line_has(data: bytes, columns: int) -> bool:
    """Whether every line holds so many words, or none; some million lines at a time."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", min(len(data), start + _CHECKED_BYTES)) + 1 or len(data)
        text = np.frombuffer(data, np.uint8, end - start, start)
        is_space = text <= ord(" ")
        begins = ~is_space
        begins[1:] &= is_space[:-1]
        ends = np.concatenate([[0], np.flatnonzero(text == ord("\n")) + 1, [len(text)]])
        words = np.diff(np.searchsorted(np.flatnonzero(begins), ends))
        if ((words != columns) & (words != 0)).any():
            return False
        start = end
    return True


def _malformed(path: Path, columns: int, what: str) -> DataError:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = line.replace(",", " ").split()
        if line.strip() and (len(fields) != columns or not all(f.lstrip("-").isdigit() for f in fields)):
            return DataError(f"{path}, line {number}: {line[:60]!r} is not {what} in whole numbers.")
    return DataError(f"{path} is not a list of {what} in whole numbers.")


def read_columns(path: Path, names: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Columns of a CSV file by the names in its first line, upper and lower case alike.

    Args:
        path: the file.
        names: columns that must be there.
        optional: columns that may be there.

    Returns:
        name -> (rows,) strings.

    Raises:
        DataError: missing, a column missing, a line of another length, or no line.
    """
    rows = list(csv.reader(read_lines(path)))
    header = [field.strip().casefold() for field in rows[0]] if rows else []
    lacking = [name for name in names if name.casefold() not in header]
    if lacking:
        raise DataError(
            f"{path} has no column {lacking[0]!r}; its first line is {','.join(rows[0] if rows else [])!r}."
        )
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"{path}, line {number} has {len(row)} fields, the first line has {len(header)}.")
    if len(rows) < 2:
        raise DataError(f"{path} lists nothing below its first line.")
    wanted = [*names, *(name for name in optional if name.casefold() in header)]
    return {name: np.array([row[header.index(name.casefold())].strip() for row in rows[1:]]) for name in wanted}


def as_ids(values: NDArray[Any], *, path: Path, what: str) -> NDArray[np.int64]:
    """Strings as whole numbers.

    Raises:
        DataError: one of them is none.
    """
    try:
        return values.astype(np.int64)
    except (ValueError, OverflowError) as error:
        wrong = next((str(v) for v in values.tolist() if not str(v).lstrip("-").isdigit()), str(values[0]))
        raise DataError(f"{path}: {what} {wrong!r} is no whole number.") from error


def matlab_cells(path: Path, names: str, ids: str | None = None) -> tuple[list[str], NDArray[np.int64]]:
    """A cell array of names and the numbers beside it, from a MATLAB file up to version 7.2.

    Args:
        path: the .mat file.
        names: variable with the names, (N, 1) or (N, 2) cells.
        ids: variable with the numbers; None: there is none.

    Returns:
        All names row by row, and (N,) numbers (empty without `ids`).

    Raises:
        DataError: missing, of another format, or without these variables.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        found = loadmat(str(path))
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError, MatReadError) as error:
        raise DataError(f"{path} cannot be read as a MATLAB file up to version 7.2: {error}.") from error
    lacking = [name for name in (names, ids) if name is not None and name not in found]
    if lacking:
        there = ", ".join(name for name in found if not name.startswith("__"))
        raise DataError(f"{path} holds no variable {lacking[0]!r}; it holds {there or 'none'}.")
    cells = np.atleast_1d(found[names])
    listed = [str(np.asarray(cell).reshape(-1)[0]) if np.size(cell) else "" for cell in cells.reshape(-1)]
    numbers = np.empty(0, np.int64) if ids is None else np.asarray(found[ids]).reshape(-1).astype(np.int64)
    if ids is not None and len(numbers) != len(listed):
        raise DataError(f"{path}: {len(listed)} names in {names!r}, but {len(numbers)} numbers in {ids!r}.")
    return listed, numbers
