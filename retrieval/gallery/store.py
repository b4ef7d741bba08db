"""The files of a gallery: what lies in its directory, and how one whole state replaces another.

    manifest.json             says which generation is the valid one; replaced last, by a rename
    embeddings-GGGGGGGG.npy   (N, D) float32, unit length
    entries-GGGGGGGG.npz      entry_ids (N,), subject_ids (N,) strings; norms (N,) float32 before normalisation
    .lock                     held by the one writer

A writer takes the lock, writes the files of the next generation under new names, replaces the manifest, and deletes the
files of the old one. A crash before the rename of the manifest leaves the old state, one after it the new state; what
else it leaves behind is removed by the next writer. Readers take no lock: they keep the files that they opened, and
start over when a writer replaced the manifest meanwhile.
"""

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aroface.contract import InputContract
from aroface.errors import DataError
from aroface.files import atomic_path, read_json, sha256_of, write_json

__all__ = [
    "Entries",
    "FileRecord",
    "IndexKind",
    "Manifest",
    "check_new",
    "commit",
    "concatenated",
    "is_gallery",
    "read_manifest",
    "read_state",
    "write_lock",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

_LOCK_NAME = ".lock"
_OWN_FILE = re.compile(
    r"(embeddings-\d{8}\.npy|entries-\d{8}\.npz)|\.(embeddings-\d{8}\.npy|entries-\d{8}\.npz|manifest\.json)\..+\.tmp"
)

#: Ways to search; `flat` compares with every entry.
IndexKind = Literal["flat"]


class FileRecord(BaseModel):
    """A data file of a gallery."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z]+-\d{8}\.np[yz]$", description="inside the directory of the gallery")
    bytes: int = Field(ge=0, description="length of the file")
    sha256: str = Field(description="hex digest of the file")


class Manifest(BaseModel):
    """What `manifest.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = Field(description="of this directory layout")
    generation: int = Field(ge=1, description="grows by one with every change")
    dimension: int = Field(ge=1, description="D of the embeddings")
    count: int = Field(ge=0, description="enrolled entries")
    num_subjects: int = Field(ge=0, description="different subject ids among them")
    index: IndexKind = Field(description="how the gallery is searched")
    metric: Literal["cosine"] = Field(default="cosine", description="similarity of two embeddings")
    model_id: str | None = Field(default=None, description="model that made the embeddings, when known")
    contract: InputContract | None = Field(default=None, description="what that model sees, when known")
    embeddings: FileRecord = Field(description="the (N, D) float32 unit vectors")
    entries: FileRecord = Field(description="ids and norms, in the order of the vectors")


@dataclass(frozen=True)
class Entries:
    """Who is enrolled, one row per embedding."""

    entry_ids: NDArray[np.str_]  #: (N,) unique
    subject_ids: NDArray[np.str_]  #: (N,)
    norms: NDArray[np.float32]  #: (N,) length of each embedding before it was normalised

    def __len__(self) -> int:
        """N."""
        return len(self.entry_ids)


def is_gallery(directory: Path) -> bool:
    """Whether a gallery has been committed there."""
    return (directory / MANIFEST_NAME).is_file()


@contextmanager
def write_lock(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of `directory`; the system frees it when the process ends, however it ends.

    Raises:
        DataError: another process is changing the gallery.
    """
    descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(
            f"Gallery {directory} is being changed by another process; try again when it is done."
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def commit(
    directory: Path,
    blocks: Iterator[NDArray[np.float32]],
    entries: Entries,
    *,
    generation: int,
    dimension: int,
    index: IndexKind,
    model_id: str | None,
    contract: InputContract | None,
) -> Manifest:
    """Make `blocks` and `entries` the state of `directory`. The caller holds the lock.

    Args:
        directory: of the gallery; exists.
        blocks: unit vectors, (b, D) each, together as many rows as `entries`; written as they come.
        entries: ids and norms.
        generation: of the new state, above the old one.
        dimension: D.
        index: how it will be searched.
        model_id: model of the embeddings, if known.
        contract: its input contract, if known.
    """
    embeddings_path = directory / f"embeddings-{generation:08d}.npy"
    entries_path = directory / f"entries-{generation:08d}.npz"
    with atomic_path(embeddings_path) as temporary:
        _write_embeddings(temporary, blocks, len(entries), dimension)
    with atomic_path(entries_path) as temporary, temporary.open("wb") as file:
        np.savez(file, entry_ids=entries.entry_ids, subject_ids=entries.subject_ids, norms=entries.norms)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        generation=generation,
        dimension=dimension,
        count=len(entries),
        num_subjects=len(np.unique(entries.subject_ids)),
        index=index,
        model_id=model_id,
        contract=contract,
        embeddings=_record(embeddings_path),
        entries=_record(entries_path),
    )
    write_json(directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
    _remove_other_generations(directory, {manifest.embeddings.name, manifest.entries.name})
    return manifest


def check_new(directory: Path) -> None:
    """Refuse to make a gallery among files of another kind.

    Raises:
        DataError: `directory` holds something that is not a remainder of an interrupted build.
    """
    foreign = [p.name for p in directory.iterdir() if p.name != _LOCK_NAME and not _OWN_FILE.fullmatch(p.name)]
    if foreign:
        raise DataError(
            f"{directory} holds other files ({', '.join(sorted(foreign)[:3])}); name a new or an empty directory."
        )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of `directory`.

    Raises:
        DataError: no gallery there, or one of another format.
    """
    if not is_gallery(directory):
        raise DataError(f"{directory} is no gallery (no {MANIFEST_NAME} in it); make one with `aroface gallery build`.")
    value = read_json(directory / MANIFEST_NAME)
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"Gallery {directory} has format_version {version}; this aroface reads {FORMAT_VERSION}. Build it again."
        )
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{directory / MANIFEST_NAME} is not a gallery manifest: {error}.") from error


def read_state(directory: Path, *, verify: bool = True) -> tuple[Manifest, NDArray[np.float32], Entries]:
    """One whole state: manifest, memory-mapped (N, D) embeddings, entries.

    Args:
        directory: of the gallery.
        verify: compare the checksums, which reads every byte once.

    Raises:
        DataError: missing, damaged, or not what the manifest says.
    """
    manifest = read_manifest(directory)
    while True:
        try:
            return manifest, *_read_files(directory, manifest, verify)
        except FileNotFoundError as error:
            newer = read_manifest(directory)
            if newer.generation == manifest.generation:
                raise DataError(
                    f"Gallery {directory}: {error.filename} is missing. Restore it from a copy, or build it again."
                ) from error
            manifest = newer


def _read_files(directory: Path, manifest: Manifest, verify: bool) -> tuple[NDArray[np.float32], Entries]:
    for record in (manifest.embeddings, manifest.entries):
        _check_file(directory / record.name, record, verify)
    try:
        embeddings: NDArray[np.float32] = np.load(directory / manifest.embeddings.name, mmap_mode="r")
        with np.load(directory / manifest.entries.name, allow_pickle=False) as arrays:
            entries = Entries(*(arrays[name] for name in ("entry_ids", "subject_ids", "norms")))
    except (ValueError, KeyError) as error:
        raise DataError(f"Gallery {directory} cannot be read: {error}. Build it again.") from error
    shape = (manifest.count, manifest.dimension)
    if embeddings.shape != shape or embeddings.dtype != np.float32 or len(entries) != manifest.count:
        raise DataError(
            f"Gallery {directory}: {embeddings.dtype} {embeddings.shape} embeddings and {len(entries)} entries, where "
            f"the manifest says float32 {shape}. Build it again."
        )
    return embeddings, entries


def _check_file(path: Path, record: FileRecord, verify: bool) -> None:
    damaged = path.stat().st_size != record.bytes or (verify and sha256_of(path) != record.sha256)
    if damaged:
        raise DataError(
            f"{path} is damaged: its length or checksum is not what the manifest says. Restore it, or build "
            "the gallery again."
        )


def _write_embeddings(path: Path, blocks: Iterator[NDArray[np.float32]], count: int, dimension: int) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)


def _record(path: Path) -> FileRecord:
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _remove_other_generations(directory: Path, keep: set[str]) -> None:
    for path in directory.iterdir():
        if path.name not in keep and _OWN_FILE.fullmatch(path.name):
            path.unlink()


def concatenated(parts: Sequence[Entries]) -> Entries:
    """Entries of several parts, one after the other."""
    columns: list[NDArray[Any]] = [
        np.concatenate([getattr(part, name) for part in parts]) for name in ("entry_ids", "subject_ids", "norms")
    ]
    return Entries(*columns)
