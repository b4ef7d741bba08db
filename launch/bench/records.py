"""A RecordIO writer, for sets to measure with."""

import struct
from pathlib import Path

__all__ = ["FRAME", "HEADER", "MAGIC", "RecordWriter"]

MAGIC = 0xCED7230A
#: Magic word and length of a record; flag, label and two ids of an image.
FRAME, HEADER = struct.Struct("<2I"), struct.Struct("<IfQQ")


class RecordWriter:
    """Writes `train.rec`, `train.idx` and `property`; a context manager. Images must not hold the magic word."""

    def __init__(self, folder: Path, *, classes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "property").write_text(f"{classes},112,112", encoding="utf-8")
        self._records = (folder / "train.rec").open("wb")
        self._index = (folder / "train.idx").open("w", encoding="utf-8")
        self._count = 0

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._records.close()
        self._index.close()

    def add(self, image: bytes, label: int) -> None:
        """Append one image file."""
        record = HEADER.pack(0, label, self._count, 0) + image
        self._index.write(f"{self._count}\t{self._records.tell()}\n")
        self._records.write(FRAME.pack(MAGIC, len(record)) + record + bytes(-len(record) % 4))
        self._count += 1
