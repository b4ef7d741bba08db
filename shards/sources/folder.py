"""A folder tree `identity/image.jpg`."""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from aroface.errors import DataError
from shards.sources.names import group_by_identity

__all__ = ["FolderSource"]


class FolderSource:
    """Images under one folder; links to folders are followed, each folder is read once."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"Source {path} is not a folder.")
        self._root = path
        rows = group_by_identity(_file_names(path), source=str(path))
        self.identities = [row[0] for row in rows]
        self.keys = [row[1] for row in rows]
        self._names = [row[2] for row in rows]

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or rewritten (by its size or time of modification)."""
        digest = sha256()
        for key, name in zip(self.keys, self._names, strict=True):
            status = (self._root / name).stat()
            digest.update(f"{key}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """The bytes of one image file."""
        path = self._root / self._names[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _file_names(root: Path) -> Iterator[str]:
    """Paths of all files under `root`, relative to it."""
    seen: set[tuple[int, int]] = set()
    for directory, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would be walked for ever
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        prefix = os.path.relpath(directory, root)
        yield from (file if prefix == "." else f"{prefix}/{file}" for file in files)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
