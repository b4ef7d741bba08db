"""Shards as a training set: memory-mapped through the index, in an order that is a pure function of the position."""

import logging
import mmap
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aroface.config.data import OrderConfig, RandomOrder
from aroface.errors import DataError
from aroface.images import decode_rgb, resize_face
from shards.manifest import Index, Manifest, manifest_fingerprint, read_identities, read_index, read_manifest
from shards.order import Blocks, build_order

if TYPE_CHECKING:
    from aroface.types import Batch
    from shards.shard_cache import ShardCache

__all__ = ["ShardDataset"]

logger = logging.getLogger(__name__)


class ShardDataset:
    """A shard directory as `aroface.types.TrainingData`.

    Args:
        directory: written by `aroface pack`.
        image_size: side of the delivered images in pixels; others are resized.
        min_images_per_identity: identities with fewer images are left out and the classes numbered anew without gaps.
        workers: decoding threads; they do not change what is delivered.
        max_bad_samples: unreadable samples tolerated before `batches` gives up. Each is replaced by the next readable
            sample in stored order, so that every batch keeps its size.
        order: which sample stands where in the stream; None: random.
        cache: brings the tars from elsewhere as they are needed; None: they are there.

    Raises:
        DataError: not a finished shard directory, or an index, a tar or a label that contradicts the manifest.
    """

    def __init__(
        self,
        directory: Path,
        *,
        image_size: int,
        min_images_per_identity: int = 1,
        workers: int = 1,
        max_bad_samples: int = 0,
        order: OrderConfig | None = None,
        cache: "ShardCache | None" = None,
    ) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self.fingerprint = manifest_fingerprint(directory)
        self.image_size = image_size
        self.workers = workers
        self.max_bad_samples = max_bad_samples
        self._cache = cache
        self._bad: set[int] = set()
        self._bad_lock = threading.Lock()
        self._indices = [self._open_index(i) for i in range(len(self.manifest.shards))]
        self._maps: list[mmap.mmap | None] = [None] * len(self._indices)
        self._starts = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        self._start_list: list[int] = self._starts.tolist()
        self._kept: NDArray[np.int64] | None = None
        self._class_map: NDArray[np.int64] | None = None
        self.num_classes = self.manifest.num_classes
        self._check_labels()
        if min_images_per_identity > 1:
            self._leave_out_small(min_images_per_identity)
        self._order = build_order(
            order or RandomOrder(), self.num_samples, labels=self._kept_labels, names=self._kept_names
        )
        self._advised = -1

    @property
    def num_samples(self) -> int:
        """Images in one epoch."""
        return self.manifest.num_samples if self._kept is None else len(self._kept)

    @property
    def num_stored(self) -> int:
        """Images in the shards, also those of identities that are left out."""
        return self.manifest.num_samples

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.directory.name

    def _open_index(self, shard: int) -> Index:
        entry = self.manifest.shards[shard]
        tar = self.directory / entry.name
        index = read_index(tar.with_suffix(".idx"), entry=entry)
        if self._cache is not None:
            return index
        if not tar.is_file():
            raise DataError(f"{tar} is missing. Run `aroface verify {self.directory}`.")
        if tar.stat().st_size != entry.bytes:
            raise DataError(
                f"{tar} is {tar.stat().st_size} bytes long, the manifest says {entry.bytes}: "
                f"it was cut short or replaced. Run `aroface verify {self.directory}`, copy it again, or pack again."
            )
        return index

    def labels(self) -> NDArray[np.int64]:
        """(N,) class of every stored image, as the shards number them."""
        return np.concatenate([np.asarray(index.label) for index in self._indices]).astype(np.int64)

    @property
    def num_bad(self) -> int:
        """Unreadable samples met so far."""
        return len(self._bad)

    def _check_labels(self) -> None:
        for shard, index in enumerate(self._indices):
            if index.label.min() >= 0 and index.label.max() < self.manifest.num_classes:
                continue
            wrong = np.flatnonzero((index.label < 0) | (index.label >= self.manifest.num_classes))
            raise DataError(
                f"{self.describe(int(self._starts[shard] + wrong[0]))} has label {int(index.label[wrong[0]])}; the "
                f"manifest has {self.manifest.num_classes} classes, numbered from 0. Pack again."
            )

    def _leave_out_small(self, min_images: int) -> None:
        labels = self.labels()
        counts = np.bincount(labels, minlength=self.manifest.num_classes)
        keep_class = counts >= min_images
        if not keep_class.any():
            raise DataError(
                f"data.min_images_per_identity = {min_images} leaves nothing of {self.directory}: its largest identity "
                f"has {int(counts.max())} images. Lower it."
            )
        self._kept = np.flatnonzero(keep_class[labels])
        self._class_map = np.cumsum(keep_class) - 1
        self.num_classes = int(keep_class.sum())

    def image_bytes(self) -> NDArray[np.int32]:
        """(N,) bytes of every stored image file."""
        return np.concatenate([np.asarray(index.length) for index in self._indices])

    def samples_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """Samples at stream positions: position p is place p mod N of epoch p // N."""
        result = self._order.samples_at(positions, seed=seed)
        return result if self._kept is None else self._kept[result]

    def _kept_labels(self) -> NDArray[np.int64]:
        labels = self.labels()
        return labels if self._kept is None or self._class_map is None else self._class_map[labels[self._kept]]

    def _kept_names(self) -> list[str]:
        names = [identity.name for identity in read_identities(self.directory)]
        if self._class_map is None:
            return names
        kept = np.diff(self._class_map, prepend=-1) > 0
        return [name for name, is_kept in zip(names, kept, strict=True) if is_kept]

    def read_ahead(self, position: int, *, seed: int) -> None:
        """Ask the system to read the blocks around a position, once per window of a block order."""
        if not isinstance(self._order, Blocks):
            return
        window, ranges = self._order.ranges_near(position, seed=seed)
        if window <= self._advised:
            return
        self._advised = window
        for start, stop in ranges:
            rows = np.arange(start, stop) if self._kept is None else self._kept[start:stop]
            shards = np.searchsorted(self._starts, rows, side="right") - 1
            if self._cache is not None:
                self._cache.fetch_ahead(np.unique(shards).tolist())
            else:
                self._advise(rows, shards)

    def _advise(self, rows: NDArray[np.int64], shards: NDArray[np.int64]) -> None:
        """Read the bytes of samples into the page cache, in the background."""
        for shard in np.unique(shards).tolist():
            own = rows[shards == shard] - self._starts[shard]
            index = self._indices[shard]
            first = int(index.offset[own[0]]) // mmap.PAGESIZE * mmap.PAGESIZE
            last = int(index.offset[own[-1]] + index.length[own[-1]])
            self._tar(shard).madvise(mmap.MADV_WILLNEED, first, last - first)

    def read(self, sample: int) -> tuple[memoryview, int]:
        """Bytes of the image file and class index of one stored sample."""
        shard, row = self._locate(sample)
        index = self._indices[shard]
        offset = int(index.offset[row])
        label = int(index.label[row])
        mapped = label if self._class_map is None else int(self._class_map[label])
        return memoryview(self._tar(shard))[offset : offset + int(index.length[row])], mapped

    def _locate(self, sample: int) -> tuple[int, int]:
        shard = bisect_right(self._start_list, sample) - 1  # on one number ten times as fast as searchsorted
        return shard, sample - self._start_list[shard]

    def _tar(self, shard: int) -> mmap.mmap:
        tar = self._maps[shard]
        if tar is None:
            if self._cache is not None:
                self._cache.fetch(shard)
            with (self.directory / self.manifest.shards[shard].name).open("rb") as file:
                tar = self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return tar

    def member_name(self, sample: int) -> str:
        """Name of the image in its tar, such as `identity/image.jpg`: from the header block before its bytes."""
        shard, row = self._locate(sample)
        offset = int(self._indices[shard].offset[row])
        header = self._tar(shard)[max(0, offset - tarfile.BLOCKSIZE) : offset]
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            return f"offset {offset}"

    def fill(self, samples: NDArray[np.int64], images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Decode samples into the rows of a batch; bad ones are replaced within the tolerance."""
        for row, sample in enumerate(samples.tolist()):
            images[row], labels[row] = self._decode(sample)

    def _decode(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        place = sample if self._kept is None else int(np.searchsorted(self._kept, sample))
        for step in range(self.num_samples):
            substitute = (place + step) % self.num_samples
            stored = substitute if self._kept is None else int(self._kept[substitute])
            data, label = self.read(stored)
            try:
                return resize_face(decode_rgb(data), self.image_size), label
            except DataError as error:
                self._count_bad(stored, error)
        raise DataError(f"{self.directory}: no readable sample is left. Pack the source again.")

    def _count_bad(self, sample: int, error: DataError) -> None:
        with self._bad_lock:
            if sample in self._bad:
                return
            self._bad.add(sample)
            count = len(self._bad)
        message = f"{self.describe(sample)}: {error}"
        if count > self.max_bad_samples:
            raise DataError(
                f"{message} That is bad sample {count}; data.max_bad_samples allows {self.max_bad_samples}. "
                f"Run `aroface verify {self.directory}`, or raise data.max_bad_samples."
            ) from error
        logger.warning("Skipped %s", message)

    def batches(
        self, *, seed: int, start_position: int, num_batches: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator["Batch"]:
        """See `aroface.types.TrainingData.batches`."""
        from shards.loader import iterate_batches

        return iterate_batches(
            self,
            seed=seed,
            start_position=start_position,
            num_batches=num_batches,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )

    def describe(self, sample: int) -> str:
        """`shard-000003.tar: identity/name.jpg` of one stored sample."""
        return f"{self.manifest.shards[self._locate(sample)[0]].name}: {self.member_name(sample)}"
