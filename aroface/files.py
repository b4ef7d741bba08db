"""Files that are whole or absent: atomic writes, checksums, refusals to overwrite."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aroface.errors import ArofaceError, DataError

__all__ = [
    "NO_ROOM",
    "atomic_path",
    "fsync_directory",
    "new_directory",
    "read_json",
    "sha256_of",
    "write_csv",
    "write_json",
    "writing",
]

#: The disk takes no more.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, on error delete it.

    A crash at any moment leaves the old file, the new file, or no file: never a part of one. An OSError on the way
    names `path`, not the temporary one.
    """
    with _naming(path):
        if path.is_dir():  # before the work, and of `.` the system would say that it is busy
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.fchmod(handle, 0o644)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let the system's errors name `path` where they name a temporary file beside it, or, for want of room, none."""
    try:
        yield
    except OSError as error:
        if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            error.errno, error.strerror = errno.ENOSPC, f"only a part was taken ({error})"  # NumPy does not tell why
        is_temporary = os.path.basename(str(error.filename)).startswith(f".{path.name}.")
        if is_temporary or (error.filename is None and error.errno in NO_ROOM):
            error.filename = str(path)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what a full or broken disk kept from being written.

    Raises:
        ArofaceError: instead of any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise ArofaceError(
            f"{path} cannot be written: {error}. Free space or mend the disk, and give the same command again."
        ) from error


def fsync_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has no word for them."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DataError: the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}; an object is expected.")
    return value


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, atomically. Names that are no Unicode keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")


def new_directory(path: Path, *, what: str) -> Path:
    """Create `path`, or accept it when empty.

    Raises:
        DataError: it exists and holds something; nothing is ever overwritten silently.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{what} {path} exists already and is not empty. Name another one, or remove it first.")
    path.mkdir(parents=True, exist_ok=True)
    return path
