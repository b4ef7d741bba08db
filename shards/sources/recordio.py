"""InsightFace / MXNet RecordIO: `train.rec` with `train.idx` and `property`, read without MXNet.

A record is a magic word, a word of 3 flag bits and 29 length bits, the data, and padding to 4 bytes (dmlc-core,
recordio.h). Data that hold the magic word at a multiple of 4 bytes are cut there into several parts; the reader puts
the word back. An image record begins with the header of MXNet's image packer (flag, label, id, id2: `IfQQ`); a flag
above 0 is the number of float labels that follow. Record 0 of InsightFace's sets is no image: its labels say where the
identity records begin.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from aroface.errors import DataError
from shards.sources.base import Entry, suffix_of_bytes

__all__ = ["RecordIoSource", "recordio_prefix"]

_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_FRAME = struct.Struct("<2I")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _LAST = 0, 1, 3  # 2: in the middle
_LENGTH_MASK = (1 << 29) - 1
_MAX_LABELS = 1 << 16


def recordio_prefix(path: Path) -> Path | None:
    """`DIR/train` for a folder that holds one `.rec`, a `.rec` file, or that prefix itself; None for anything else."""
    if path.is_dir():
        found = sorted(path.glob("*.rec"))
        return found[0].with_suffix("") if len(found) == 1 else None
    if path.suffix == ".rec":
        return path.with_suffix("")
    return path if path.with_name(f"{path.name}.rec").is_file() else None


class RecordIoSource:
    """Images of one `.rec`; the identity is the label, written with eight digits so that labels keep their order."""

    def __init__(self, path: Path) -> None:
        prefix = recordio_prefix(path)
        if prefix is None:
            raise DataError(f"Source {path} is no RecordIO set; name the folder, the .rec or the prefix of one .rec.")
        self._path = prefix.with_name(f"{prefix.name}.rec")
        self._index = prefix.with_name(f"{prefix.name}.idx")
        try:
            with self._path.open("rb") as file:
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path} cannot be read: {error}.") from error

    def entries(self) -> Iterator[Entry]:
        """Every image record, in the order of the index; record 0 and the identity records are passed over."""
        classes = self._num_classes()
        first_identity = self._first_identity_record()
        for key, offset in self._offsets():
            if first_identity is not None and (key == 0 or key >= first_identity):
                continue
            where = f"{self._path}: record {key}"
            record = self._record(offset, where)  # a view: only its first bytes are read
            label, start = _image_header(record, where)
            if classes is not None and label >= classes:
                raise DataError(f"{where}: label {label}, but the property file says {classes} classes.")
            suffix = suffix_of_bytes(record[start : start + 12])
            if suffix is None:
                begin = bytes(record[start : start + 4])
                raise DataError(f"{where} holds no JPEG, PNG, BMP or WebP file (its first bytes: {begin!r}).")
            yield Entry(f"{label:08d}", f"{key:08d}{suffix}", self._path.name, offset, len(record) - start)

    def read(self, entry: Entry) -> bytes:
        """The image file inside one record."""
        where = f"{self._path}: record {entry.name.partition('.')[0]}"
        record = self._record(entry.offset, where)
        return bytes(record[_image_header(record, where)[1] :])

    def _record(self, offset: int, where: str) -> memoryview:
        """The data of the record at an offset, put together where they lie in parts."""
        return self._record_and_end(offset, where)[0]

    def _record_and_end(self, offset: int, where: str) -> tuple[memoryview, int]:
        parts: list[memoryview] = []
        while True:
            if offset < 0 or offset + _FRAME.size > len(self._data):
                raise DataError(f"{where} lies beyond the end of the file (byte {offset}); the .rec was cut short.")
            magic, word = _FRAME.unpack_from(self._data, offset)
            kind, length = word >> 29, word & _LENGTH_MASK
            begins = kind in (_WHOLE, _FIRST)
            if magic != _MAGIC or kind > _LAST or begins == bool(parts):
                raise DataError(
                    f"{where}: no record begins at byte {offset}. The .rec is damaged, or the .idx belongs to another "
                    f".rec; remove {self._index.name} to have it made anew, or copy both again."
                )
            start = offset + _FRAME.size
            if start + length > len(self._data):
                raise DataError(f"{where} is cut short: {len(self._data) - start} of {length} bytes are there.")
            parts.append(self._data[start : start + length])
            offset = start + -(-length // 4) * 4
            if kind == _WHOLE:
                return parts[0], offset
            if kind == _LAST:
                return memoryview(_MAGIC_BYTES.join(parts)), offset

    def _offsets(self) -> Iterator[tuple[int, int]]:
        """(record number, offset), from the index or, without one, by walking through the records."""
        if self._index.is_file():
            yield from _read_index(self._index)
            return
        key = offset = 0
        while offset < len(self._data):
            yield key, offset
            offset = self._record_and_end(offset, f"{self._path}: record {key}")[1]
            key += 1

    def _first_identity_record(self) -> int | None:
        """From the labels of record 0; None when that is an image like the others."""
        zero = next((offset for key, offset in self._offsets() if key == 0), None)
        if zero is None:
            return None
        record = self._record(zero, f"{self._path}: record 0")
        if len(record) < _HEADER.size:
            return None
        flag, *_ = _HEADER.unpack_from(record)
        start = _HEADER.size + 4 * flag
        if not flag or flag > _MAX_LABELS or len(record) < start or suffix_of_bytes(record[start:]) is not None:
            return None
        return int(struct.unpack_from("<f", record, _HEADER.size)[0])

    def _num_classes(self) -> int | None:
        path = self._path.parent / "property"
        if not path.is_file():
            return None
        first = path.read_text(encoding="utf-8", errors="replace").split(",")[0].strip()
        if not first.isdigit():
            raise DataError(f"{path} should read classes,height,width; it begins with {first[:20]!r}.")
        return int(first)


def _image_header(record: memoryview, where: str) -> tuple[int, int]:
    """Label and place of the image file in a record."""
    if len(record) < _HEADER.size:
        raise DataError(f"{where} has {len(record)} bytes, too few for the header of an image.")
    flag, label, _, _ = _HEADER.unpack_from(record)
    start = _HEADER.size
    if flag:
        if flag > _MAX_LABELS or len(record) < start + 4 * flag:
            raise DataError(f"{where} claims {flag} labels, more than it has room for.")
        label = struct.unpack_from("<f", record, start)[0]
        start += 4 * flag
    if not label >= 0 or label != int(label):  # also NaN
        raise DataError(f"{where}: label {label} is no class index (0, 1, 2, ...).")
    return int(label), start


def _read_index(path: Path) -> Iterator[tuple[int, int]]:
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            fields = line.split()
            if len(fields) != 2 or not fields[0].isdigit() or not fields[1].isdigit():
                raise DataError(f"{path}, line {number}: expected NUMBER OFFSET, found {line.strip()[:40]!r}.")
            yield int(fields[0]), int(fields[1])
    if not number:
        raise DataError(f"{path} is empty; remove it to have it made anew.")
