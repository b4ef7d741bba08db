"""One shard: a tar and its index, written together, whole or absent."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from aroface.errors import DataError
from aroface.files import atomic_path, sha256_of
from shards.manifest import ShardEntry, write_index

__all__ = ["ShardWriter", "sample_name", "shard_name", "write_shard"]


def shard_name(number: int) -> str:
    """File name of a shard without suffix."""
    return f"shard-{number:06d}"


def sample_name(key: str) -> tuple[str, str]:
    """Sample key and suffix inside the tar; WebDataset ends a key at the first dot of the file name."""
    path = PurePosixPath(key)
    suffix = path.suffix.lower().replace(".jpeg", ".jpg")
    return str(path.parent / path.stem.replace(".", "_")), suffix


class ShardWriter:
    """Takes the samples of one shard; made by `write_shard`."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
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
        self.offsets.append(self._append(f"{stem}{suffix}", data))
        self.lengths.append(len(data))
        self._append(f"{stem}.cls", str(label).encode())
        self.labels.append(label)

    def _append(self, name: str, data: bytes) -> int:
        """Append one member without owner or time; returns the offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        try:
            self._tar.addfile(member, io.BytesIO(data))
        except ValueError as error:
            raise DataError(
                f"{name!r} does not fit into a tar header ({error}); rename the image or its folder."
            ) from error
        return int(self._tar.offset) - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


@contextmanager
def write_shard(directory: Path, name: str) -> Iterator[ShardWriter]:
    """Write `name.tar` and `name.idx`, in this order, each atomically; nothing stays of a shard without samples.

    Args:
        directory: of the shards.
        name: from `shard_name`.
    """
    path = directory / f"{name}.tar"
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            writer = ShardWriter(tar)
            yield writer
        digest, tar_bytes = sha256_of(temporary), temporary.stat().st_size
    if not writer.labels:
        path.unlink()
        return
    index = directory / f"{name}.idx"
    write_index(index, writer.offsets, writer.lengths, writer.labels, tar_bytes=tar_bytes, tar_sha256=digest)
    writer.entry = ShardEntry(name=f"{name}.tar", samples=len(writer.labels), bytes=tar_bytes, sha256=digest)
