"""Any source layout, or a shard directory, as named faces: what embedding and evaluation read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aroface.images import decode_rgb
from aroface.types import FaceSet
from shards.dataset import ShardDataset
from shards.manifest import MANIFEST_NAME, read_identities
from shards.pack import read_table
from shards.sources import SourceOptions, open_source

__all__ = ["open_face_set"]


def open_face_set(path: Path, *, options: SourceOptions | None = None) -> FaceSet:
    """Faces in any source layout or a shard directory, sorted by identity and name.

    Raises:
        DataError: nothing there, or of no known layout.
    """
    if path.is_dir() and (path / MANIFEST_NAME).is_file():
        return _ShardFaces(path)
    return _SourceFaces(path, options)


class _SourceFaces:
    def __init__(self, path: Path, options: SourceOptions | None) -> None:
        self._source = open_source(path, options)
        self._table = read_table([path], options)
        rows = range(len(self._table))
        self.keys: Sequence[str] = [self._table.key(row) for row in rows]
        self.identities: Sequence[str] = [self._table.identities[i] for i in self._table.identity]

    def read(self, index: int) -> NDArray[np.uint8]:
        return decode_rgb(self._source.read(self._table.entry(index)[1]), name=self.keys[index])


class _ShardFaces:
    def __init__(self, directory: Path) -> None:
        self._dataset = ShardDataset(directory, image_size=112)
        names = [identity.name for identity in read_identities(directory)]
        rows = [
            (names[self._dataset.read(sample)[1]], self._dataset.member_name(sample), sample)
            for sample in range(self._dataset.num_samples)
        ]
        rows.sort()
        self.identities: Sequence[str] = [row[0] for row in rows]
        self.keys: Sequence[str] = [row[1] for row in rows]
        self._samples = [row[2] for row in rows]

    def read(self, index: int) -> NDArray[np.uint8]:
        return decode_rgb(self._dataset.read(self._samples[index])[0], name=self.keys[index])
