"""The members of a tar, one after the other, by seeking from header to header: 20 times as fast as `tarfile`.

Reads ustar, GNU long names and pax paths and sizes. `tarfile` keeps an object of every member it has passed, 10 GB for
the 25 million members of WebFace12M; here nothing is kept.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from aroface.errors import DataError
from shards.tar_header import BLOCK_BYTES

__all__ = ["TarMember", "tar_members"]

_REGULAR = b"0\x007"
_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_MAX_EXTENSION_BYTES = 1 << 20


class TarMember(NamedTuple):
    """One member that is no directory."""

    name: str
    offset: int  #: of its data
    size: int  #: bytes of its data
    is_file: bool  #: False for links and devices


def tar_members(path: Path) -> Iterator[TarMember]:
    """Every file or link of an uncompressed tar, in stored order.

    Raises:
        DataError: not a tar, or damaged or cut short; the last whole member is named.
    """
    with path.open("rb") as file:
        head = file.read(6)
        if (
            head[:2] == b"\x1f\x8b"
            or head[:3] == b"BZh"
            or head[:6] == b"\xfd7zXZ\0"
            or head[:4] == b"\x28\xb5\x2f\xfd"
        ):
            raise DataError(
                f"{path} is a compressed tar; images in it cannot be read in place. Unpack it (images hardly "
                "compress), or store it again without compression."
            )
        yield from _walk(file, path)


def _walk(file: BinaryIO, path: Path) -> Iterator[TarMember]:
    total = file.seek(0, 2)
    position, last = 0, "the beginning"
    name: str | None = None
    size_override: int | None = None
    while True:
        header = _block(file, position, path, total, last)
        if not any(header):
            return
        if not _checksum_is_right(header):
            raise DataError(f"{path}: no tar header after {last} (byte {position}); the file is damaged or not a tar.")
        size, kind = _number(header[124:136]), header[156:157]
        data = position + BLOCK_BYTES
        if kind in (_LONG_NAME, _PAX):
            if size > _MAX_EXTENSION_BYTES:
                raise DataError(f"{path}: a name of {size} bytes after {last}; the file is damaged.")
            file.seek(data)
            extension = file.read(size)
            if kind == _LONG_NAME:
                name = extension.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                fields = _pax_fields(extension)
                name = fields.get("path", name)
                size_override = int(fields["size"]) if "size" in fields else None
        elif kind != _PAX_GLOBAL:
            size = size if size_override is None else size_override
            found = name if name is not None else _name(header)
            if data + size > total:
                raise DataError(f"{path}: {found} is cut short, {total - data} of {size} bytes; last whole: {last}.")
            if kind != b"5":
                yield TarMember(found, data, size, kind in _REGULAR)
            name, size_override, last = None, None, found
        position = data + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _block(file: BinaryIO, position: int, path: Path, total: int, last: str) -> bytes:
    file.seek(position)
    header = file.read(BLOCK_BYTES)
    if len(header) < BLOCK_BYTES:
        raise DataError(f"{path} ends at byte {total} without the mark of its end; it was cut short after {last}.")
    return header


def _checksum_is_right(header: bytes) -> bool:
    try:
        told = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    return told == sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return 0


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax_fields(extension: bytes) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE` and a line feed."""
    fields: dict[str, str] = {}
    start = 0
    while start < len(extension):
        length = extension[start : start + 20].partition(b" ")[0]
        if not length.isdigit() or not int(length):
            break
        record = extension[start + len(length) + 1 : start + int(length) - 1]
        key, _, value = record.partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start += int(length)
    return fields
