"""The files of a gallery: what lies in its directory, and how one whole state replaces another.

    manifest.json                  says which files make up the valid state, and its own checksum; replaced last
    embeddings-GGGGGGGG-SSSS.npy   (n, D) float32, unit length: one segment of at most `SEGMENT_ROWS` entries
    entries-GGGGGGGG-SSSS.npz      entry_ids, subject_ids (n,) strings; norms (n,) before normalisation; numbers (n,)
    index-GGGGGGGG.faiss           of the approximate kinds
    indexed-GGGGGGGG.npy           numbers of the entries in the index, in its order
    .lock                          held by the one writer

G is the generation that wrote a file, S the segment. A number is given to an entry once and never again; rows are
ordered by it. Files are never changed: a writer takes the lock, writes new files under new names, replaces the
manifest, and deletes what the new manifest does not name. A crash before the rename leaves the old state, one after it
the new state; what else it leaves behind is removed by the next writer. Readers take no lock: they keep the files that
they opened, and start over when a writer replaced the manifest meanwhile.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aroface.contract import InputContract
from aroface.errors import DataError
from aroface.files import read_json, sha256_of, write_json
from aroface.locks import try_lock
from retrieval.gallery.records import Calibration, IndexKind, Recall

__all__ = [
    "RESTORE",
    "FileRecord",
    "GalleryBusyError",
    "IndexRecord",
    "Manifest",
    "SegmentRecord",
    "check_file",
    "check_new",
    "files_of_unknown_state",
    "is_gallery",
    "new_manifest",
    "read_manifest",
    "record_of",
    "remove_unreferenced",
    "replace_manifest",
    "write_lock",
]

FORMAT_VERSION = 3
#: What to do about damage: a gallery that cannot be opened can still be replaced.
RESTORE = "Restore it from a copy, or build the gallery again with `aroface gallery build --replace`."
MANIFEST_NAME = "manifest.json"

_CHECKSUM = "sha256"
_LOCK_NAME = ".lock"
_DATA_FILE = r"(embeddings|entries|index|indexed)-\d{8}(-\d{4,})?\.(npy|npz|faiss)"
_GENERATION = re.compile(r"(?<=-)\d{8}")
_OWN_FILE = re.compile(rf"{_DATA_FILE}|\.({_DATA_FILE}|manifest\.json)\..+\.tmp")


class GalleryBusyError(DataError):
    """Another process is changing the gallery."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A data file of a gallery."""

    name: str = Field(pattern=rf"^{_DATA_FILE}$", description="inside the directory of the gallery")
    bytes: int = Field(ge=0, description="length of the file")
    sha256: str = Field(description="hex digest of the file")


class SegmentRecord(_Record):
    """Entries that were written together."""

    rows: int = Field(ge=1, description="entries in the segment")
    embeddings: FileRecord = Field(description="the (rows, D) float32 unit vectors")
    entries: FileRecord = Field(description="ids, norms and numbers, in the order of the vectors")


class IndexRecord(_Record):
    """A Faiss index and what is known about it."""

    file: FileRecord = Field(description="the index")
    indexed: FileRecord = Field(description="(rows,) numbers of the entries that it holds")
    rows: int = Field(ge=1, description="entries when it was made; later removals are skipped at search")
    until: int = Field(ge=1, description="entries with this number or a higher one are compared one by one")
    factory: str = Field(description="what Faiss calls it")
    effort: int = Field(ge=0, description="lists visited (ivf) or candidates kept (hnsw); 0 for the others")
    rescored: int = Field(ge=1, description="candidates compared again for each place of a list")
    recall: Recall = Field(description="measured against exact search when the index was made")


class Manifest(_Record):
    """What `manifest.json` says."""

    format_version: Literal[3] = Field(description="of this directory layout")
    gallery_id: str = Field(pattern=r"^[0-9a-f]{32}$", description="drawn when the gallery was made")
    generation: int = Field(ge=1, description="grows by one with every change")
    dimension: int = Field(ge=1, description="D of the embeddings")
    count: int = Field(ge=0, description="enrolled entries")
    num_subjects: int = Field(ge=0, description="different subject ids among them")
    next_number: int = Field(ge=0, description="of the next entry")
    index: IndexKind = Field(description="how the gallery is searched")
    metric: Literal["cosine"] = Field(default="cosine", description="similarity of two embeddings")
    model_id: str | None = Field(default=None, description="model that made the embeddings, when known")
    contract: InputContract | None = Field(default=None, description="what that model sees, when known")
    segments: tuple[SegmentRecord, ...] = Field(description="all entries, in the order of their numbers")
    index_record: IndexRecord | None = Field(default=None, description="None where every entry is compared")
    calibration: tuple[Calibration, ...] = Field(default=(), description="thresholds for false-positive rates")

    @property
    def file_names(self) -> set[str]:
        """Every data file of the state."""
        names = {file.name for segment in self.segments for file in (segment.embeddings, segment.entries)}
        if self.index_record:
            names |= {self.index_record.file.name, self.index_record.indexed.name}
        return names


def new_manifest(
    gallery_id: str,
    *,
    generation: int,
    dimension: int,
    index: IndexKind,
    model_id: str | None,
    contract: InputContract | None,
) -> Manifest:
    """The manifest of an empty gallery."""
    return Manifest(
        format_version=FORMAT_VERSION,
        gallery_id=gallery_id,
        generation=generation,
        dimension=dimension,
        count=0,
        num_subjects=0,
        next_number=0,
        index=index,
        model_id=model_id,
        contract=contract,
        segments=(),
    )


def is_gallery(directory: Path) -> bool:
    """Whether a gallery has been committed there."""
    return (directory / MANIFEST_NAME).is_file()


@contextmanager
def write_lock(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of `directory`; the system frees it when the process ends, however it ends.

    Raises:
        GalleryBusyError: another process is changing the gallery.
    """
    with try_lock(directory / _LOCK_NAME) as lock:
        if not lock.is_mine:
            raise GalleryBusyError(
                f"Gallery {directory} is being changed by another process ({lock.holder}); try again when it is done."
            )
        yield


def replace_manifest(directory: Path, manifest: Manifest) -> None:
    """Make `manifest` the state of `directory`, then delete the files it does not name. The caller holds the lock."""
    value = manifest.model_dump(mode="json")
    write_json(directory / MANIFEST_NAME, {**value, _CHECKSUM: _checksum(value)})
    remove_unreferenced(directory, manifest.file_names)


def _checksum(value: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def remove_unreferenced(directory: Path, keep: Collection[str]) -> None:
    """Delete data files of other states than the one to keep, and what a crash left. The caller holds the lock."""
    for path in directory.iterdir():
        if path.name not in keep and _OWN_FILE.fullmatch(path.name):
            path.unlink()


def check_new(directory: Path) -> None:
    """Refuse to make a gallery among files of another kind.

    Raises:
        DataError: `directory` holds something that is not a remainder of an interrupted build.
    """
    if foreign := _foreign(directory):
        raise DataError(f"{directory} holds other files ({', '.join(foreign[:3])}); name a new or an empty directory.")


def files_of_unknown_state(directory: Path) -> tuple[int, set[str]]:
    """The highest generation and all data files of a gallery whose manifest cannot be read.

    Raises:
        DataError: `directory` is no gallery: it holds other files beside its manifest, or nothing.
    """
    names = {path.name for path in directory.iterdir() if _OWN_FILE.fullmatch(path.name)}
    foreign = [name for name in _foreign(directory) if name != MANIFEST_NAME]
    if foreign or not names:
        found = f"other files ({', '.join(foreign[:3])})" if foreign else "no data of one"
        raise DataError(
            f"{directory} cannot be replaced: its {MANIFEST_NAME} is not that of a gallery, and beside it are {found}. "
            "Name another directory, or delete this one if nothing in it is needed."
        )
    return max((int(found[0]) for found in map(_GENERATION.search, names) if found), default=0), names


def _foreign(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name != _LOCK_NAME and not _OWN_FILE.fullmatch(p.name))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of `directory`.

    Raises:
        DataError: no gallery there, a damaged manifest, or one of another format.
    """
    if not is_gallery(directory):
        raise DataError(f"{directory} is no gallery (no {MANIFEST_NAME} in it); make one with `aroface gallery build`.")
    try:
        value = read_json(directory / MANIFEST_NAME)
    except DataError as error:
        raise DataError(f"{error} The gallery's manifest is damaged: {RESTORE}") from error
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"Gallery {directory} has format_version {version}; this aroface reads {FORMAT_VERSION}. Build it again "
            "with `aroface gallery build --replace`."
        )
    if value.pop(_CHECKSUM, None) != _checksum(value):
        raise DataError(f"{directory / MANIFEST_NAME} is damaged: its checksum is not that of what it says. {RESTORE}")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{directory / MANIFEST_NAME} is not a gallery manifest: {error}.") from error


def record_of(path: Path) -> FileRecord:
    """The record of a file that has been written."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def check_file(directory: Path, record: FileRecord, *, verify: bool) -> Path:
    """The path of a data file, its length and, with `verify`, its checksum compared.

    Raises:
        DataError: it is not the file that was written.
    """
    path = directory / record.name
    if path.stat().st_size != record.bytes or (verify and sha256_of(path) != record.sha256):
        raise DataError(
            f"{path} is damaged or of another gallery: its length or checksum is not what the manifest says. {RESTORE}"
        )
    return path
