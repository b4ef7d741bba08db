"""Any source layout, a shard directory or a plain folder, as named faces: what embedding and evaluation read."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.align import align_face
from aroface.errors import ConfigError, DataError
from aroface.images import decode_rgb
from aroface.types import FaceSet
from shards.dataset import ShardDataset
from shards.landmark_file import read_landmarks
from shards.manifest import MANIFEST_NAME, read_identities
from shards.pack import read_table
from shards.sources import SourceOptions, detect_format, open_source
from shards.sources.base import IMAGE_SUFFIXES, size_of_file
from shards.sources.folder import FolderSource
from shards.sources.list_file import ListSource

__all__ = ["ImageFolder", "StoredFaces", "align_faces", "aligned_when_packed", "open_face_set", "shard_of_rows"]


class StoredFaces(FaceSet, Protocol):
    """Faces that lie on disk."""

    def digest(self, chosen: Sequence[int]) -> str:
        """Hex digest of some images that changes when they are replaced; equal for a copy on another machine.

        Of shards that of the manifest, else of the size of each image, its checksum where the layout has one, and the
        landmarks that it is aligned by. No image is read, so another one of the same size may go unnoticed.

        Args:
            chosen: indices of the images.
        """
        ...


def open_face_set(
    path: Path, *, options: SourceOptions | None = None, align: bool = False, as_stored: bool = False
) -> StoredFaces:
    """Faces of a shard directory or of any layout, sorted by identity and name, so that all give one order.

    Args:
        path: shards, a source of any layout, or one folder of images without identities.
        options: of the layout.
        align: crop each image by the landmarks that its list tells; shards and a plain folder have no list.
        as_stored: leave the faces of shards in the order of the shards, which reads them one after the other.

    Raises:
        DataError: nothing there, or of no known layout.
        ConfigError: `align` for what has no landmarks.
    """
    if path.is_dir() and (path / MANIFEST_NAME).is_file():
        shards = _ShardFaces(path, is_sorted=not as_stored)
        if align:
            known = shards.manifest.aligned_by
            how = "not by any landmarks" if known is None else f"by {known}"
            raise _no_list(path, f"shards, whose faces were aligned when they were packed, or never (here: {how})")
        return shards
    if path.is_dir() and options is None and _is_flat(path):
        if align:
            raise _no_list(path, "a plain folder of images")
        return ImageFolder(path)
    return _SourceFaces(path, options, align=align)


def align_faces(faces: StoredFaces, landmarks: Path) -> StoredFaces:
    """The same faces, each cropped by its five points when it is read.

    Args:
        faces: named as the file names them.
        landmarks: see `shards.landmark_file.read_landmarks`.

    Raises:
        DataError: the file is malformed, or lacks a face.
    """
    points = read_landmarks(landmarks)
    lacking = [key for key in faces.keys if key not in points]
    if lacking:
        raise DataError(
            f"--landmarks {landmarks} lacks {len(lacking)} of {len(faces.keys)} images, such as {lacking[0]!r}; its "
            f"names are like {next(iter(points))!r}."
        )
    return _AlignedFaces(faces, points)


def shard_of_rows(faces: FaceSet) -> Sequence[int] | None:
    """(N,) number of the shard that holds each face; None where there are no shards."""
    return faces.shards if isinstance(faces, _ShardFaces) else None


def aligned_when_packed(faces: FaceSet) -> str | None:
    """The landmarks that faces in shards were cropped by when they were packed; None where nobody knows of any."""
    return faces.manifest.aligned_by if isinstance(faces, _ShardFaces) else None


def _no_list(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"--align crops by the landmarks in a list of images, and {path} is {what}. Leave --align out to take the "
        "faces as they are, name the list itself, or give the points with --landmarks FILE."
    )


def _is_flat(folder: Path) -> bool:
    entries = list(folder.iterdir())
    has_images = any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries)
    return has_images and not any(entry.is_dir() for entry in entries) and detect_format(folder) == "folder"


class ImageFolder:
    """The image files below a folder; keys are paths relative to it, identities the names of their folders."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder of images.")
        self._folder = folder
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.keys: Sequence[str] = sorted(path.relative_to(folder).as_posix() for path in paths)
        self.identities: Sequence[str] = [key.rpartition("/")[0].rpartition("/")[2] for key in self.keys]
        if not self.keys:
            raise DataError(f"{folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}).")

    def read(self, index: int) -> NDArray[np.uint8]:
        """Pixels of one image."""
        path = self._folder / self.keys[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        return decode_rgb(data, name=str(path))

    def digest(self, chosen: Sequence[int]) -> str:
        """See `StoredFaces`."""
        return _digest(np.array([size_of_file(self._folder / self.keys[index]) for index in chosen], np.int64))


class _AlignedFaces:
    def __init__(self, faces: StoredFaces, points: Mapping[str, Sequence[float]]) -> None:
        self._faces, self._points = faces, points
        self.keys, self.identities = faces.keys, faces.identities

    def read(self, index: int) -> NDArray[np.uint8]:
        return align_face(self._faces.read(index), self._points[self.keys[index]])

    def digest(self, chosen: Sequence[int]) -> str:
        points = np.array([self._points[self.keys[index]] for index in chosen], np.float64)
        return _digest(np.frombuffer(self._faces.digest(chosen).encode(), np.uint8), points)


class _SourceFaces:
    def __init__(self, path: Path, options: SourceOptions | None, *, align: bool) -> None:
        self._source = open_source(path, options)
        self._table = read_table([path], options)
        self._align = align
        rows = range(len(self._table))
        self.keys: Sequence[str] = [self._table.key(row) for row in rows]
        self.identities: Sequence[str] = [self._table.identities[i] for i in self._table.identity]

    def read(self, index: int) -> NDArray[np.uint8]:
        _, entry = self._table.entry(index)
        pixels = decode_rgb(self._source.read(entry), name=self.keys[index])
        if not self._align:
            return pixels
        if entry.landmarks is None:
            raise DataError(f"{self.keys[index]}: its list tells no landmarks to align it by.")
        return align_face(pixels, entry.landmarks)

    def digest(self, chosen: Sequence[int]) -> str:
        table, rows = self._table, np.asarray(chosen, np.int64)
        columns: list[NDArray[Any]] = [table.landmarks[rows]] if self._align else []
        if isinstance(self._source, ListSource):
            lines = (entry for _, _, entry in table.entries(rows))
            return _digest(np.fromiter(self._source.image_sizes(lines), np.int64, len(rows)), *columns)
        if not isinstance(self._source, FolderSource):  # whose checks are times, which a copy does not keep
            columns.append(table.check[rows])
        return _digest(table.length[rows], *columns)


class _ShardFaces:
    def __init__(self, directory: Path, *, is_sorted: bool) -> None:
        self._dataset = ShardDataset(directory, image_size=112)
        self.manifest = self._dataset.manifest
        names = [identity.name for identity in read_identities(directory)]
        identities = [names[label] for label in self._dataset.labels().tolist()]
        keys = [self._dataset.member_name(sample) for sample in range(self._dataset.num_samples)]
        sizes = [shard.samples for shard in self.manifest.shards]
        shards = np.repeat(np.arange(len(sizes)), sizes).tolist()
        self._samples = list(range(len(keys)))
        if is_sorted:
            self._samples.sort(key=lambda sample: (identities[sample], keys[sample]))
        self.identities: Sequence[str] = [identities[sample] for sample in self._samples]
        self.keys: Sequence[str] = [keys[sample] for sample in self._samples]
        self.shards: Sequence[int] = [shards[sample] for sample in self._samples]

    def read(self, index: int) -> NDArray[np.uint8]:
        return decode_rgb(self._dataset.read(self._samples[index])[0], name=self.keys[index])

    def digest(self, chosen: Sequence[int]) -> str:
        return self._dataset.fingerprint


def _digest(*columns: NDArray[Any]) -> str:
    return sha256(b"".join(column.tobytes() for column in columns)).hexdigest()
