"""All images of one or several sources in a few arrays: about 40 bytes and the length of the name each.

A list of Python objects would take half a kilobyte per image, 6 GB for the 12 million of WebFace12M.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise, repeat
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import read_json, write_json
from shards.sources.base import Entry, Landmarks

__all__ = ["ImageTable", "TableBuilder"]

#: Type codes of the columns while they grow.
_BUILDER_COLUMNS = {"identity": "i", "part": "i", "offset": "q", "length": "I", "check": "I", "name_length": "H"}
_NAMES_AT_ONCE = 1 << 16
_COLUMNS = ("identity", "part", "offset", "length", "check", "name_end", "names", "landmarks")


@dataclass(frozen=True)
class ImageTable:
    """N images sorted by identity, then name; every array may be memory-mapped."""

    identities: Sequence[str]  #: (I,) distinct, sorted
    parts: Sequence[tuple[int, str, str]]  #: source index, part of that source, prefix of its identities
    identity: NDArray[np.int32]  #: (N,) index into `identities`, ascending
    part: NDArray[np.int32]  #: (N,) index into `parts`
    offset: NDArray[np.int64]  #: (N,)
    length: NDArray[np.uint32]  #: (N,)
    check: NDArray[np.uint32]  #: (N,)
    name_end: NDArray[np.int64]  #: (N,) end of each name in `names`
    names: NDArray[np.uint8]  #: all names, UTF-8, end to end
    landmarks: NDArray[np.float32]  #: (N, 10), or (0, 10) when the sources tell none

    def __len__(self) -> int:
        return len(self.identity)

    def name(self, row: int | np.integer[Any]) -> str:
        """Name of an image within its identity."""
        start = int(self.name_end[row - 1]) if row else 0
        return self.names[start : int(self.name_end[row])].tobytes().decode("utf-8", "surrogateescape")

    def key(self, row: int) -> str:
        """`identity/name`."""
        return f"{self.identities[self.identity[row]]}/{self.name(row)}"

    def entries(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, int, Entry]]:
        """Key, source index and the entry as that source listed it, of each row; columns are gathered at once."""
        starts = np.where(rows > 0, self.name_end[rows - 1], 0).tolist()
        ends, names = self.name_end[rows].tolist(), self.names.data
        columns = (self.identity, self.part, self.offset, self.length, self.check)
        gathered = zip(starts, ends, *(column[rows].tolist() for column in columns), strict=True)
        points = self._points(rows)
        for start, end, identity, part, offset, length, check in gathered:
            source, part_name, prefix = self.parts[part]
            full, name = self.identities[identity], bytes(names[start:end]).decode("utf-8", "surrogateescape")
            own = full.removeprefix(prefix)
            yield f"{full}/{name}", source, Entry(own, name, part_name, offset, length, check, next(points))

    def _points(self, rows: NDArray[np.int64]) -> Iterator[Landmarks | None]:
        if not len(self.landmarks):
            yield from repeat(None, len(rows))
            return
        for row in self.landmarks[rows].tolist():
            yield None if isnan(row[0]) else tuple(row)

    def entry(self, row: int) -> tuple[int, Entry]:
        """Source index and the entry as that source listed it."""
        return next(self.entries(np.array([row])))[1:]

    def fingerprint(self) -> str:
        """Hex digest that changes when any name, size, place or check does."""
        digest = sha256("\n".join(self.identities).encode("utf-8", "surrogateescape"))
        digest.update(repr(list(self.parts)).encode("utf-8", "surrogateescape"))
        for column in _COLUMNS:
            digest.update(np.ascontiguousarray(getattr(self, column)).data)
        return digest.hexdigest()

    def with_landmarks(self, landmarks: Mapping[str, Sequence[float]]) -> "ImageTable":
        """The same images with landmarks by key, in place of what the sources told; others keep theirs.

        Raises:
            DataError: no image has one of the keys.
        """
        values = np.array(self.landmarks, np.float32) if len(self.landmarks) else np.full((len(self), 10), np.nan, "f4")
        known = 0
        for row in range(len(self)):
            points = landmarks.get(self.key(row))
            if points is not None:
                values[row] = points
                known += 1
        if not known:
            raise DataError(
                f"None of the {len(landmarks)} landmarks belongs to an image: they name {next(iter(landmarks))!r}, "
                f"the images are called like {self.key(0)!r}."
            )
        return replace(self, landmarks=values)

    def save(self, directory: Path) -> None:
        """Write the columns, so that other processes can map them."""
        directory.mkdir(parents=True, exist_ok=True)
        for column in _COLUMNS:
            np.save(directory / f"{column}.npy", getattr(self, column), allow_pickle=False)
        write_json(directory / "names.json", {"identities": list(self.identities), "parts": list(self.parts)})

    @classmethod
    def load(cls, directory: Path) -> "ImageTable":
        """Map what `save` wrote."""
        names = read_json(directory / "names.json")
        columns = {
            column: np.asarray(np.load(directory / f"{column}.npy", mmap_mode="r", allow_pickle=False))
            for column in _COLUMNS  # as plain arrays: numpy's memmap class makes every access three times as slow
        }
        parts = [(int(source), str(part), str(prefix)) for source, part, prefix in names["parts"]]
        return cls(identities=names["identities"], parts=parts, **columns)


class TableBuilder:
    """Collects entries of one source after the other, then sorts them once, column by column.

    While it collects an image takes 26 bytes and its name, at the peak of the sorting about 50 and its name.
    """

    def __init__(self) -> None:
        self._identities: dict[str, int] = {}
        self._parts: dict[tuple[int, str, str], int] = {}
        self._columns = {name: array(code) for name, code in _BUILDER_COLUMNS.items()}
        self._names = bytearray()
        self._landmarks = array("f")

    def add(self, entries: Iterable[Entry], *, source: int, prefix: str = "") -> None:
        """Append the entries of one source.

        Args:
            entries: what it lists.
            source: its index.
            prefix: put before its identities, so that equal names of different sources stay different people.

        Raises:
            DataError: a name is longer than 65,535 bytes, or an image larger than 4 GiB.
        """
        add_identity, add_part, add_offset, add_length, add_check, add_name_length = (
            column.append for column in self._columns.values()
        )
        for entry in entries:
            identity, part = f"{prefix}{entry.identity}", (source, entry.part, prefix)
            name = entry.name.encode("utf-8", "surrogateescape")
            try:
                add_name_length(len(name))
                add_length(entry.length)
            except OverflowError as error:
                raise DataError(f"{identity}/{entry.name[:80]}: the name or the image is too long.") from error
            add_identity(self._identities.setdefault(identity, len(self._identities)))
            add_part(self._parts.setdefault(part, len(self._parts)))
            add_offset(entry.offset)
            add_check(entry.check)
            self._names += name
            if entry.landmarks is not None:
                self._pad_landmarks(len(self._columns["identity"]) - 1)
                self._landmarks.extend(entry.landmarks)

    def _pad_landmarks(self, rows: int) -> None:
        missing = rows - len(self._landmarks) // 10
        self._landmarks.extend([float("nan")] * 10 * missing)

    def finish(self, *, what: str) -> ImageTable:
        """Sort by identity, then name; the builder is empty afterwards.

        Args:
            what: the sources, for messages.

        Raises:
            DataError: there is no image, or two have one key.
        """
        if not self._columns["identity"]:
            raise DataError(f"{what} holds no images of the form identity/image.jpg (.bmp .jpeg .jpg .png .webp).")
        if self._landmarks:
            self._pad_landmarks(len(self._columns["identity"]))
        names = sorted(self._identities)
        rank = np.empty(len(names), np.int32)
        rank[[self._identities[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        identity = rank[self._take("identity")]
        sizes = self._take("name_length")
        ends = np.cumsum(sizes, dtype=np.int64)
        order = self._sort(identity, names, ends, what)
        identity = identity[order]
        sorted_names = self._sorted_names(order, ends)
        del ends
        landmarks = np.frombuffer(self._landmarks, np.float32).reshape(-1, 10)
        return ImageTable(
            identities=names,
            parts=list(self._parts),
            identity=identity,
            part=self._take("part")[order],
            offset=self._take("offset")[order],
            length=self._take("length")[order],
            check=self._take("check")[order],
            name_end=np.cumsum(sizes[order], dtype=np.int64),
            names=sorted_names,
            landmarks=landmarks[order] if len(landmarks) else landmarks,
        )

    def _take(self, name: str) -> NDArray[Any]:
        """One column; its memory is free when the caller lets go of it."""
        column = self._columns.pop(name)
        return np.frombuffer(column, np.dtype(column.typecode))

    def _name(self, row: int, ends: NDArray[np.int64]) -> bytes:
        start = ends[row - 1] if row else 0
        return bytes(self._names[start : ends[row]])

    def _sorted_names(self, order: NDArray[np.int32], ends: NDArray[np.int64]) -> NDArray[np.uint8]:
        sorted_names, start = np.empty(len(self._names), np.uint8), 0
        for first in range(0, len(order), _NAMES_AT_ONCE):
            block = b"".join(self._name(row, ends) for row in order[first : first + _NAMES_AT_ONCE].tolist())
            sorted_names[start : start + len(block)] = np.frombuffer(block, np.uint8)
            start += len(block)
        self._names = bytearray()
        return sorted_names

    def _sort(
        self, identity: NDArray[np.int32], names: Sequence[str], ends: NDArray[np.int64], what: str
    ) -> NDArray[np.int32]:
        order = np.argsort(identity, kind="stable").astype(np.int32)
        edges = np.cumsum(np.bincount(identity, minlength=len(names))).tolist()
        start = 0
        for group, end in enumerate(edges):
            rows = [(self._name(row, ends), row) for row in order[start:end].tolist()]
            rows.sort()
            for (first, row), (second, other) in pairwise(rows):
                if first == second:
                    key = f"{names[group]}/{first.decode('utf-8', 'replace')}"
                    parts, part = list(self._parts), self._columns["part"]
                    raise DataError(
                        f"{what}: {parts[part[row]][1]!r} and {parts[part[other]][1]!r} would both be image {key!r}; "
                        "rename one of them."
                    )
            order[start:end] = [row for _, row in rows]
            start = end
        return order
