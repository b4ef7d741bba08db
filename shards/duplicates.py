"""Images that occur more than once, byte for byte, found by a 128-bit hash of the file."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aroface.files import write_csv
from shards.image_table import ImageTable

__all__ = ["DUPLICATES_NAME", "HASH_BYTES", "Duplicates", "find_duplicates", "hash_image", "write_duplicates"]

DUPLICATES_NAME = "duplicates.csv"
HASH_BYTES = 16


def hash_image(data: bytes) -> bytes:
    """16 bytes; equal for equal files, and for no others that will ever be seen."""
    return sha256(data).digest()[:HASH_BYTES]


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal images, in the order of their first image."""

    groups: Sequence[Sequence[int]]  #: rows of the table, ascending, two or more in each
    conflicts: Sequence[bool]  #: the images of a group belong to different people

    @property
    def num_surplus(self) -> int:
        """Images beyond the first of their group."""
        return sum(len(group) - 1 for group in self.groups)

    @property
    def num_conflicts(self) -> int:
        """Groups of images that belong to different people."""
        return sum(self.conflicts)

    def rows_to_drop(self) -> NDArray[np.int64]:
        """All but the first image of a group of one person; all images of a conflict, whose label nobody knows."""
        rows = [
            row
            for group, conflict in zip(self.groups, self.conflicts, strict=True)
            for row in (group if conflict else group[1:])
        ]
        return np.array(sorted(rows), np.int64)


def find_duplicates(rows: NDArray[np.int64], hashes: NDArray[np.uint8], person: NDArray[np.int32]) -> Duplicates:
    """Group equal hashes.

    Args:
        rows: (M,) rows of the table.
        hashes: (M, 16) from `hash_image`; all zero for an image that could not be read.
        person: (M,) person of each row.
    """
    first = np.ascontiguousarray(hashes).view("<u8")[:, 0]
    order = np.argsort(first, kind="stable")
    first = first[order]
    # Neighbours with one first half; few, so that only they become Python objects.
    later = np.flatnonzero(first[1:] == first[:-1]) + 1
    groups: dict[bytes, list[int]] = {}
    for place in order[np.union1d(later - 1, later)].tolist():
        digest = hashes[place].tobytes()
        if any(digest):
            groups.setdefault(digest, []).append(place)
    found = sorted(sorted(group, key=lambda i: rows[i]) for group in groups.values() if len(group) > 1)
    found.sort(key=lambda group: rows[group[0]])
    return Duplicates(
        groups=[[int(rows[place]) for place in group] for group in found],
        conflicts=[len({int(person[place]) for place in group}) > 1 for group in found],
    )


def write_duplicates(
    directory: Path, table: ImageTable, people: Sequence[str], found: Duplicates, *, drop: bool
) -> None:
    """Write `duplicates.csv`: one line per image of a group, atomically."""
    rows = [
        (number, table.key(row), people[table.identity[row]], *("yes" if b else "no" for b in (conflict, packed)))
        for number, (group, conflict) in enumerate(zip(found.groups, found.conflicts, strict=True))
        for place, row in enumerate(group)
        for packed in [not drop or (not conflict and place == 0)]
    ]
    write_csv(directory / DUPLICATES_NAME, ("group", "image", "identity", "conflict", "packed"), rows)
