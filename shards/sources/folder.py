"""A folder tree `identity/image.jpg`."""

import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from aroface.errors import DataError
from shards.sources.base import Entry, entry_of_path

__all__ = ["FolderSource"]

logger = logging.getLogger(__name__)


class FolderSource:
    """Images under one folder; links to folders are followed, each folder is read once, by its own name."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"Source {path} is not a folder.")
        self._root = path

    def entries(self) -> Iterator[Entry]:
        """Every image; `check` is made of the time of modification."""
        folder_of: dict[str, str] = {}
        for directory, names in _folders(self._root):
            prefix = os.path.relpath(directory, self._root)
            for name in names:
                path = name if prefix == "." else f"{prefix}/{name}"
                found = entry_of_path(path, source=str(self._root), folder_of=folder_of)
                if found is not None:
                    identity, image, folder = found
                    length, check = _length_and_check(os.path.join(directory, name))
                    yield Entry(identity, image, folder, 0, length, check)

    def read(self, entry: Entry) -> bytes:
        """The bytes of one image file."""
        path = self._root / entry.part / entry.name
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _length_and_check(path: str) -> tuple[int, int]:
    """Zeros for what is not there, such as the end of a broken link: `read` tells, as of any unreadable image."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, (status.st_mtime_ns ^ status.st_mtime_ns >> 32) & 0xFFFFFFFF


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder under `root` with the names of its files, by its own name before that of any link to it."""
    seen: set[tuple[int, int]] = set()
    waiting, left_out = deque([str(root)]), list[str]()
    while waiting:
        for directory, folders, files in os.walk(waiting.popleft(), onerror=_refuse):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would be walked for ever
                folders.clear()
                left_out.append(directory)
                continue
            seen.add((status.st_dev, status.st_ino))
            waiting += sorted(path for name in folders if os.path.islink(path := os.path.join(directory, name)))
            yield directory, files
    if left_out:
        logger.warning(
            "%s leads to a folder that is read under another name (%d such in all); it is left out.",
            left_out[0],
            len(left_out),
        )


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
