"""One or many `.zip` files of `identity/image.jpg`, read in place.

The table of contents is walked through in pieces: `zipfile` would keep half a kilobyte per member in memory, 6 GB for
the archives of WebFace12M. Layout of the records: PKWARE APPNOTE 6.3.10, sections 4.3.7, 4.3.12, 4.3.14-16, 4.5.3.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from aroface.errors import DataError
from shards.sources.base import MAX_IMAGE_BYTES, Entry, entry_of_path
from shards.sources.in_place import OpenFiles

__all__ = ["ZipSource"]

_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 0x1, 0x800
_PIECE_BYTES = 1 << 20
_32_BITS = 0xFFFFFFFF
_LARGEST_RECORD = _CENTRAL.size + 3 * 0xFFFF


class _Member(NamedTuple):
    name: str
    flags: int
    method: int
    crc: int
    size: int
    header: int  #: offset of the local header


class ZipSource:
    """Images inside one zip file, or inside all zip files of a folder; each is checked against its CRC when read."""

    def __init__(self, path: Path) -> None:
        self._folder = path if path.is_dir() else path.parent
        self._names = sorted(p.name for p in path.glob("*.zip")) if path.is_dir() else [path.name]
        self._files = OpenFiles(self._folder)

    def entries(self) -> Iterator[Entry]:
        """Every image; `check` is its CRC."""
        folder_of: dict[str, str] = {}
        for archive in self._names:
            path = self._folder / archive
            for member in _members(path):
                found = entry_of_path(member.name, source=str(path), folder_of=folder_of)
                if found is None:
                    continue
                if member.flags & _ENCRYPTED or member.method not in (_STORED, _DEFLATED):
                    how = "encrypted" if member.flags & _ENCRYPTED else f"compressed by method {member.method}"
                    raise DataError(f"{path}: {member.name} is {how}; pack the archive again, stored or deflated.")
                yield Entry(found[0], found[1], archive, member.header, member.size, member.crc)

    def read(self, entry: Entry) -> bytes:
        """The bytes of one member."""
        where = f"{self._folder / entry.part}: {entry.key}"
        if entry.length > MAX_IMAGE_BYTES:
            raise DataError(f"{where} unpacks to {entry.length} bytes, over the limit for a face; remove it.")
        head = self._files.read(entry.part, entry.offset, _LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
            raise DataError(f"{where} cannot be read: no member begins at byte {entry.offset}. Copy the archive again.")
        method, _, _, _, packed, _, name, extra = _LOCAL.unpack(head)[3:]
        start = entry.offset + _LOCAL.size + name + extra
        if method == _STORED:
            data = self._files.read(entry.part, start, entry.length)
        else:
            data = self._inflate(entry, start, packed, where)
        if len(data) != entry.length or zlib.crc32(data) != entry.check:
            raise DataError(f"{where} cannot be read: Bad CRC or size. Copy the archive again.")
        return data

    def _inflate(self, entry: Entry, start: int, packed: int, where: str) -> bytes:
        """At most one byte more than the member claims, so that a bomb is stopped and noticed."""
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = b""
        piece = packed if 0 < packed <= MAX_IMAGE_BYTES else _PIECE_BYTES
        try:
            while not inflater.eof and len(data) <= entry.length:
                packed_data = self._files.read(entry.part, start, piece)
                if not packed_data:
                    break
                data += inflater.decompress(packed_data, entry.length + 1 - len(data))
                start += len(packed_data)
        except zlib.error as error:
            raise DataError(f"{where} cannot be read: {error}. Copy the archive again.") from error
        return data


def _members(path: Path) -> Iterator[_Member]:
    """The records of the central directory."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        start, size, count = _central_directory(file, path)
        file.seek(start)
        buffer, at = b"", 0
        for number in range(count):
            while len(buffer) - at < _LARGEST_RECORD and size:
                piece = file.read(min(size, _PIECE_BYTES))
                size = size - len(piece) if piece else 0
                buffer, at = buffer[at:] + piece, 0
            try:
                member, at = _member(buffer, at)
            except (struct.error, ValueError) as error:
                raise DataError(
                    f"{path}: entry {number + 1} of {count} of its table of contents is damaged; copy the "
                    "archive again."
                ) from error
            if not member.name.endswith("/"):
                yield member


def _member(buffer: bytes, at: int) -> tuple[_Member, int]:
    """The record at a place of the buffer, and the place after it."""
    magic, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, _, header = _CENTRAL.unpack_from(
        buffer, at
    )
    at += _CENTRAL.size
    end = at + name + extra + comment
    if magic != b"PK\1\2" or end > len(buffer):
        raise ValueError("no record")
    text = buffer[at : at + name].decode("utf-8" if flags & _UTF8 else "cp437", "surrogateescape")
    if _32_BITS in (size, packed, header):
        size, header = _wide(buffer[at + name : at + name + extra], size, packed, header)
    return _Member(text, flags, method, crc, size, header), end


def _wide(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int]:
    """Size and offset from the zip64 field, which holds only those that did not fit into 32 bits, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            size = next(values, size) if size == _32_BITS else size
            if packed == _32_BITS:
                next(values, None)
            return size, next(values, header) if header == _32_BITS else header
        at += 4 + length
    return size, header


def _central_directory(file: BinaryIO, path: Path) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the table of contents."""
    total = file.seek(0, 2)
    tail_start = max(0, total - _END.size - 0xFFFF - _END_64_LOCATOR.size)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise DataError(f"{path} is not a readable zip file: File is not a zip file, or its end is missing.")
    _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    locator = at - _END_64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        file.seek(_END_64_LOCATOR.unpack_from(tail, locator)[2])
        end = file.read(_END_64.size)
        if len(end) < _END_64.size or not end.startswith(b"PK\6\6"):
            raise DataError(f"{path} is not a readable zip file: its zip64 record is damaged. Copy the archive again.")
        count, size, offset = _END_64.unpack(end)[7:10]
    if offset + size > total:
        raise DataError(f"{path} is not a readable zip file: its table of contents lies beyond its end.")
    return offset, size, count
