"""A list of image paths with labels: `path label` lines, or a CSV, with or without a header and landmarks."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from aroface.errors import DataError
from shards.sources.base import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, Entry, Landmarks, size_of_file

__all__ = ["LIST_SUFFIXES", "ListSource"]

LIST_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".lst", ".list"})

_PATH_NAMES = frozenset({"path", "image", "file", "filename", "image_path", "key"})
_LABEL_NAMES = frozenset({"label", "identity", "class", "id", "name", "subject", "person", "subject_id", "class_index"})
_LANDMARK_NAMES = tuple(f"{axis}{number}" for number in range(1, 6) for axis in "xy")


class ListSource:
    """Images named by the lines of a text file.

    The separator is a tab or a comma where the first line has one, else white space with the label last. Without a
    header the columns are path, label and, where there are twelve, x1, y1, ..., x5, y5. Number labels become identities
    of eight digits, so that they keep their order.

    Args:
        path: the list.
        root: folder that relative paths start from; None: the folder of the list.
    """

    def __init__(self, path: Path, *, root: Path | None = None) -> None:
        self._path = path
        self._root = path.parent if root is None else root
        try:
            with path.open("rb") as file:
                first = file.readline().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Source {path} cannot be read as a list: {error}.") from error
        self._separator = next((mark for mark in "\t," if mark in first), None)
        names = [name.strip().lower() for name in self._split(first)]
        self._has_header = bool(_PATH_NAMES & set(names)) and bool(_LABEL_NAMES & set(names))
        self._columns = self._find_columns(names)

    def entries(self) -> Iterator[Entry]:
        """Every line; `offset` is where it begins, so that another process finds the path again."""
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not (number == 1 and self._has_header):
                    yield self._entry(line, number, offset)
                offset += len(line)

    def read(self, entry: Entry) -> bytes:
        """The bytes of the image file that a line names."""
        with self._path.open("rb") as file:
            path = self._image_path(file, entry)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{self._path} names {path}, which cannot be read: {error.strerror}.") from error
        if len(data) > MAX_IMAGE_BYTES:
            raise DataError(f"{path} has {len(data)} bytes, over the limit for a face.")
        return data

    def image_sizes(self, entries: Iterable[Entry]) -> Iterator[int]:
        """Bytes of the image files that lines name; -1 where there is none."""
        with self._path.open("rb") as file:
            for entry in entries:
                yield size_of_file(self._image_path(file, entry))

    def _image_path(self, file: BinaryIO, entry: Entry) -> Path:
        file.seek(entry.offset)
        return self._root / self._fields(file.readline(), "an entry")[0]

    def _split(self, line: str) -> list[str]:
        line = line.rstrip("\r\n")
        if self._separator is None:
            return line.rsplit(maxsplit=1)
        return next(csv.reader([line], delimiter=self._separator), [])

    def _find_columns(self, names: Sequence[str]) -> tuple[int, int, list[int]]:
        """Places of path, label and landmarks."""
        if not self._has_header:
            return 0, 1, list(range(2, 12)) if len(names) >= 12 else []
        path = next(i for i, name in enumerate(names) if name in _PATH_NAMES)
        label = next(i for i, name in enumerate(names) if name in _LABEL_NAMES and i != path)
        points = [names.index(name) for name in _LANDMARK_NAMES if name in names]
        return path, label, points if len(points) == 10 else []

    def _fields(self, line: bytes, where: str) -> tuple[str, str, Landmarks | None]:
        path, label, points = self._columns
        try:
            fields = [field.strip() for field in self._split(line.decode("utf-8-sig"))]
            landmarks: Landmarks | None = None
            if points and fields[points[0]]:
                landmarks = tuple(float(fields[i]) for i in points)  # type: ignore[assignment]  # ten of them
            return fields[path], fields[label], landmarks
        except (UnicodeDecodeError, IndexError, ValueError) as error:
            raise DataError(
                f"{self._path}, {where}: expected path and label{' and ten numbers' if points else ''}, found "
                f"{line.strip()[:60]!r} ({error})."
            ) from error

    def _entry(self, line: bytes, number: int, offset: int) -> Entry:
        where = f"line {number}"
        path, label, landmarks = self._fields(line, where)
        if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{self._path}, {where}: {path!r} is no image path ({', '.join(sorted(IMAGE_SUFFIXES))} are); "
                "the columns are path, label."
            )
        if not label or (label.startswith("-") and label[1:].isdigit()):
            raise DataError(f"{self._path}, {where}: the label {label!r} is no class index (0, 1, ...) and no name.")
        identity = f"{int(label):08d}" if label.isdigit() else label.replace("/", "_")
        name = path.replace("\\", "/").lstrip("/").replace("../", "").removeprefix(f"{identity}/").replace("/", "_")
        return Entry(identity, name, self._path.name, offset, len(line), landmarks=landmarks)
