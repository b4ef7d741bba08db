"""A `.zip` of `identity/image.jpg`, read in place."""

import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from aroface.errors import DataError
from shards.sources.base import MAX_IMAGE_BYTES, Entry, entry_of_path

__all__ = ["ZipSource"]


class ZipSource:
    """Images inside one zip file; every member is checked against its CRC as it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a readable zip file: {error}.") from error
        self._lock = threading.Lock()  # a ZipFile has one file position

    def entries(self) -> Iterator[Entry]:
        """Every image; `check` is its CRC."""
        for member in self._zip.infolist():
            found = entry_of_path(member.filename, source=str(self._path))
            if found is not None:
                identity, name, folder = found
                yield Entry(identity, name, folder, member.header_offset, member.file_size, member.CRC)

    def read(self, entry: Entry) -> bytes:
        """The bytes of one member."""
        name = f"{entry.part}/{entry.name}"
        if entry.length > MAX_IMAGE_BYTES:
            raise DataError(f"{self._path}: {name} unpacks to {entry.length} bytes, over the limit for a face.")
        try:
            with self._lock:
                return self._zip.read(name)
        except (KeyError, zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{self._path}: {name} cannot be read: {error}.") from error
