"""Reading a range of bytes of a file that many threads share, without moving a file position."""

import os
import threading
from pathlib import Path

from aroface.errors import DataError

__all__ = ["OpenFiles"]


class OpenFiles:
    """Files below one folder, opened once each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer at the end of the file.

        Raises:
            DataError: the file cannot be opened or read.
        """
        try:
            return os.pread(self._descriptor(name), length, offset)
        except OSError as error:
            raise DataError(f"{self._folder / name} cannot be read: {error.strerror}.") from error

    def _descriptor(self, name: str) -> int:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get(name)
                if descriptor is None:
                    descriptor = self._descriptors[name] = os.open(self._folder / name, os.O_RDONLY)
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
