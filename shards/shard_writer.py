"""One shard: a tar and its index, written together, whole or absent."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aroface.files import atomic_path
from shards.manifest import ShardEntry, write_index
from shards.tar_header import BLOCK_BYTES, padding, tar_header

__all__ = ["ShardWriter", "sample_name", "shard_name", "write_shard"]

_END_OF_TAR = bytes(2 * BLOCK_BYTES)
_RECORD_BYTES = 20 * BLOCK_BYTES  # tar files are padded to whole records
_BUFFER_BYTES = 1 << 20


def shard_name(number: int) -> str:
    """File name of a shard without suffix."""
    return f"shard-{number:06d}"


def sample_name(key: str) -> tuple[str, str]:
    """Sample key and suffix inside the tar; WebDataset ends a key at the first dot of the file name."""
    folder, slash, name = key.rpartition("/")
    stem, _, suffix = name.rpartition(".")
    suffix = suffix.lower()
    return f"{folder}{slash}{stem.replace('.', '_')}", ".jpg" if suffix == "jpeg" else f".{suffix}"


class ShardWriter:
    """Takes the samples of one shard; made by `write_shard`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self.bytes = 0  #: of the tar so far
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.labels: list[int] = []
        self.entry: ShardEntry | None = None  #: when the shard is finished; stays None for one without samples

    def add(self, key: str, data: bytes, label: int) -> None:
        """Append one image and its label.

        Args:
            key: `identity/image.ext`.
            data: the image file.
            label: class index.

        Raises:
            DataError: the key does not fit into a tar header.
        """
        stem, suffix = sample_name(key)
        text = str(label).encode()
        header, label_header = tar_header(f"{stem}{suffix}", len(data)), tar_header(f"{stem}.cls", len(text))
        self.offsets.append(self.bytes + len(header))
        self.lengths.append(len(data))
        self.labels.append(label)
        self._write(b"".join((header, data, padding(len(data)), label_header, text, padding(len(text)))))

    def _write(self, piece: bytes) -> None:
        self._buffer += piece
        self.bytes += len(piece)
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._digest.update(self._buffer)
        self._file.write(self._buffer)
        self._buffer.clear()

    def finish(self) -> str:
        """Write the end of the tar; returns its hex SHA-256."""
        self._write(_END_OF_TAR)
        self._write(bytes(-self.bytes % _RECORD_BYTES))
        self._flush()
        return self._digest.hexdigest()


@contextmanager
def write_shard(directory: Path, name: str) -> Iterator[ShardWriter]:
    """Write `name.tar` and `name.idx`, in this order, each atomically; nothing stays of a shard without samples.

    Args:
        directory: of the shards.
        name: from `shard_name`.
    """
    path = directory / f"{name}.tar"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = ShardWriter(file)
        yield writer
        digest = writer.finish()
    if not writer.labels:
        path.unlink()
        return
    index = directory / f"{name}.idx"
    write_index(index, writer.offsets, writer.lengths, writer.labels, tar_bytes=writer.bytes, tar_sha256=digest)
    writer.entry = ShardEntry(name=f"{name}.tar", samples=len(writer.labels), bytes=writer.bytes, sha256=digest)
