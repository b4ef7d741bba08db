"""A `.zip` of `identity/image.jpg`, read in place."""

import threading
import zipfile
import zlib
from hashlib import sha256
from pathlib import Path

from aroface.errors import DataError
from shards.sources.names import group_by_identity

__all__ = ["ZipSource"]

#: A member that unpacks to more than this is refused: no face crop is that large.
_MAX_MEMBER_BYTES = 64 << 20


class ZipSource:
    """Images inside one zip file; every member is checked against its CRC as it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a readable zip file: {error}.") from error
        rows = group_by_identity(self._zip.namelist(), source=str(path))
        self.identities = [row[0] for row in rows]
        self.keys = [row[1] for row in rows]
        self._members = [self._zip.getinfo(row[2]) for row in rows]
        self._lock = threading.Lock()  # a ZipFile has one file position

    def fingerprint(self) -> str:
        """Changes when any byte of an image changes (zip files carry the CRC of every member)."""
        rows = (f"{key} {member.file_size} {member.CRC}" for key, member in zip(self.keys, self._members, strict=True))
        return sha256("\n".join(rows).encode()).hexdigest()

    def read(self, index: int) -> bytes:
        """The bytes of one member."""
        member = self._members[index]
        if member.file_size > _MAX_MEMBER_BYTES:
            raise DataError(
                f"{self._path}: {member.filename} unpacks to {member.file_size} bytes, over the limit for a face."
            )
        try:
            with self._lock:
                return self._zip.read(member)
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{self._path}: {member.filename} cannot be read: {error}.") from error
