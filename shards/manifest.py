"""What lies beside the tars: manifest.json, identities.csv and one index per shard.

Index file: a 64-byte header, then three little-endian arrays of n entries that are memory-mapped as they are:
offset int64 (of the image bytes in the tar), length int32 (bytes), label int32 (class index).
"""

import csv
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aroface.errors import DataError
from aroface.files import atomic_path, read_json, sha256_of, write_csv

__all__ = [
    "FORMAT_VERSION",
    "IDENTITIES_NAME",
    "MANIFEST_NAME",
    "Identity",
    "Index",
    "Manifest",
    "ShardEntry",
    "manifest_fingerprint",
    "read_identities",
    "read_index",
    "read_manifest",
    "write_identities",
    "write_index",
]

FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
IDENTITIES_NAME = "identities.csv"

_INDEX_MAGIC = b"AROFIDX1"
_INDEX_HEADER = struct.Struct("<8sqq32s8x")  # magic, samples, bytes and SHA-256 of the tar
_INDEX_BYTES_PER_SAMPLE = 16


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Record):
    """One tar of the set."""

    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Record):
    """The whole set, written last: a directory without it is not a set."""

    format_version: Literal[1] = FORMAT_VERSION
    num_samples: int = Field(ge=1)
    num_classes: int = Field(ge=1)
    image_size: tuple[int, int] | None = Field(description="width and height in pixels; null when they differ")
    colour_order: Literal["rgb"] = "rgb"
    template: Literal["arcface_112"] = "arcface_112"
    aligned_by: str | None = Field(None, description="landmarks that packing cropped by; null: stored as they came")
    source: str = Field(description="what the set was packed from")
    licence: str = Field(description="licence note of the images, as given when packing")
    skipped: int = Field(ge=0, description="unreadable images that were left out")
    duplicates: int = Field(0, ge=0, description="images that are byte for byte another one of the sources")
    identities_sha256: str | None = Field(None, description="of identities.csv; null in sets of older versions")
    conflicts: int = Field(0, ge=0, description="images that are found under two or more identities")
    shards: list[ShardEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Identity:
    """One row of identities.csv."""

    class_index: int
    name: str
    images: int


@dataclass(frozen=True)
class Index:
    """Where the images of one shard lie. Arrays of n entries, memory-mapped."""

    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    label: NDArray[np.int32]
    tar_bytes: int


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a shard directory.

    Raises:
        DataError: there is none, or it is of another format version.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{directory} is not a finished shard directory (no {MANIFEST_NAME}); make one by `aroface pack`."
        )
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {values.get('format_version')!r}; this version of aroface reads "
            f"{FORMAT_VERSION}. Pack the source again."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}. Pack the source again.") from error


def manifest_fingerprint(directory: Path) -> str:
    """SHA-256 of the manifest file, which holds the SHA-256 of every tar."""
    return sha256_of(directory / MANIFEST_NAME)


def write_index(
    path: Path, offset: ArrayLike, length: ArrayLike, label: ArrayLike, *, tar_bytes: int, tar_sha256: str
) -> None:
    """Write the index of one tar, atomically. Size and SHA-256 of the tar tie the two together."""
    offsets = np.asarray(offset, "<i8")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_INDEX_HEADER.pack(_INDEX_MAGIC, len(offsets), tar_bytes, bytes.fromhex(tar_sha256)))
        file.write(offsets.tobytes())
        file.write(np.asarray(length, "<i4").tobytes())
        file.write(np.asarray(label, "<i4").tobytes())


def read_index(path: Path, *, entry: ShardEntry | None) -> Index:
    """Map one index and check that it belongs to the shard that the manifest names; None: no manifest tells.

    Raises:
        DataError: missing, cut short, or the index of another tar.
    """
    repair = "Copy the shard directory again, or pack again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_INDEX_HEADER.size)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: the index of {path.with_suffix('.tar').name}. {repair}") from error
    if len(header) < _INDEX_HEADER.size or header[:8] != _INDEX_MAGIC:
        raise DataError(f"{path} is not a shard index. {repair}")
    _, count, tar_bytes, digest = _INDEX_HEADER.unpack(header)
    if size != _INDEX_HEADER.size + count * _INDEX_BYTES_PER_SAMPLE:
        raise DataError(f"{path} is {size} bytes long, not what {count} samples take. {repair}")
    if entry is not None and (count, tar_bytes, digest.hex()) != (entry.samples, entry.bytes, entry.sha256):
        raise DataError(
            f"{path} belongs to another tar: it lists {count} samples in {tar_bytes} bytes ({digest.hex()[:12]}), "
            f"the manifest says {entry.samples} in {entry.bytes} ({entry.sha256[:12]}) for {entry.name}. {repair}"
        )
    # As a plain array: numpy's memmap class makes every access to one element three times as slow.
    body = np.asarray(np.memmap(path, np.uint8, mode="r", offset=_INDEX_HEADER.size))
    ends = np.cumsum([8 * count, 4 * count, 4 * count])
    return Index(
        offset=body[: ends[0]].view("<i8"),
        length=body[ends[0] : ends[1]].view("<i4"),
        label=body[ends[1] :].view("<i4"),
        tar_bytes=tar_bytes,
    )


def write_identities(directory: Path, identities: Sequence[Identity]) -> str:
    """Write identities.csv, atomically; returns its hex SHA-256."""
    rows = ((i.class_index, i.name, i.images) for i in identities)
    write_csv(directory / IDENTITIES_NAME, ("class_index", "identity", "images"), rows)
    return sha256_of(directory / IDENTITIES_NAME)


def read_identities(directory: Path) -> list[Identity]:
    """Rows of identities.csv, by class index.

    Raises:
        DataError: missing or malformed; the line is named.
    """
    path = directory / IDENTITIES_NAME
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Pack the source again.") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}. Copy it again, or pack again.") from error
    found: list[Identity] = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 3 or row[0] != str(len(found)) or not row[2].isdigit():
            raise DataError(
                f"{path}, line {number}: expected {len(found)},identity,images, found {','.join(row)!r}. Pack again."
            )
        found.append(Identity(int(row[0]), row[1], int(row[2])))
    return found
