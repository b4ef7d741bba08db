"""Remote shards as a training set without a copy on disk: read from beginning to end, through `webdataset`.

What is promised, and what is not. Every rank runs the same number of steps and never waits for another one's shard.
Shards come in a permuted order that is a pure function of (seed, epoch); entry i of the endless list of shards goes to
rank i mod W. Within a rank samples are shuffled in a buffer. With the same seed, number of ranks and starting point the
stream is the same. Not promised: that every sample comes once per epoch (a rank may be shards ahead of another), and
that a resumed run goes on with the very next sample: it begins at the start of the shard in which it stopped, so that
up to one shard and one buffer per rank are seen again. For the exact order set `data.cache`.
"""

import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import webdataset

from aroface.errors import DataError
from aroface.images import decode_rgb, resize_face
from aroface.types import Batch
from shards.loader import in_background
from shards.manifest import MANIFEST_NAME, Manifest, manifest_fingerprint, read_manifest
from shards.permutation import permute
from shards.remote import RemoteFiles
from shards.sources.base import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["StreamingDataset", "open_stream"]

logger = logging.getLogger(__name__)

_BUFFER_SAMPLES = 8192
_PREFETCHED_BATCHES = 3


def open_stream(address: str, *, image_size: int, max_bad_samples: int = 0) -> "StreamingDataset":
    """Stream the set at a remote address.

    Raises:
        DataError: no manifest there, or it cannot be reached.
    """
    files = RemoteFiles(address)
    with tempfile.TemporaryDirectory() as folder:
        files.download(MANIFEST_NAME, Path(folder) / MANIFEST_NAME)
        manifest, fingerprint = read_manifest(Path(folder)), manifest_fingerprint(Path(folder))
    return StreamingDataset(files, manifest, fingerprint, image_size=image_size, max_bad_samples=max_bad_samples)


class StreamingDataset:
    """`aroface.types.TrainingData` over remote shards; see the module for what its order promises.

    Args:
        files: the remote set.
        manifest: of the set.
        fingerprint: of the manifest.
        image_size: side of the delivered images in pixels.
        max_bad_samples: unreadable samples that are passed over before `batches` gives up.
        buffer_samples: samples of the shuffle buffer of a rank; about 6 KB each.
    """

    def __init__(
        self,
        files: RemoteFiles,
        manifest: Manifest,
        fingerprint: str,
        *,
        image_size: int,
        max_bad_samples: int = 0,
        buffer_samples: int = _BUFFER_SAMPLES,
    ) -> None:
        self._files = files
        self._manifest = manifest
        self.fingerprint = fingerprint
        self.image_size = image_size
        self.num_samples = manifest.num_samples
        self.num_classes = manifest.num_classes
        self.max_bad_samples = max_bad_samples
        self.num_bad = 0
        self._buffer_samples = buffer_samples
        self._starts = np.cumsum([0, *(entry.samples for entry in manifest.shards)])

    def batches(
        self, *, seed: int, start_position: int, num_batches: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """See `aroface.types.TrainingData.batches`, with the promises of this module."""
        samples = self._shuffled(self._samples(seed, start_position // world_size, rank, world_size), seed, rank)
        return in_background(self._batches(samples, num_batches, batch_size), depth=_PREFETCHED_BATCHES)

    def _batches(self, samples: Iterator[tuple[int, bytes, int]], num_batches: int, batch_size: int) -> Iterator[Batch]:
        size = self.image_size
        pin = torch.cuda.is_available()
        for _ in range(num_batches):
            images = torch.empty((batch_size, size, size, 3), dtype=torch.uint8, pin_memory=pin)
            labels = torch.empty(batch_size, dtype=torch.int64, pin_memory=pin)
            numbers = torch.empty(batch_size, dtype=torch.int64)
            row = 0
            while row < batch_size:
                number, data, label = next(samples)
                pixels = self._decode(number, data)
                if pixels is not None:
                    images[row], labels[row], numbers[row] = torch.from_numpy(pixels), label, number
                    row += 1
            yield Batch(images, labels, numbers)

    def describe(self, sample: int) -> str:
        """Shard and place of a sample."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return f"{self._manifest.shards[shard].name}: sample {sample - int(self._starts[shard])}"

    def _decode(self, number: int, data: bytes) -> "NDArray[np.uint8] | None":
        try:
            return resize_face(decode_rgb(data), self.image_size)
        except DataError as error:
            self.num_bad += 1
            message = f"{self.describe(number)}: {error}"
            if self.num_bad > self.max_bad_samples:
                raise DataError(
                    f"{message} That is bad sample {self.num_bad}; data.max_bad_samples allows {self.max_bad_samples}."
                ) from error
            logger.warning("Skipped %s", message)
            return None

    def _shard_list(self, seed: int, rank: int, world_size: int) -> Iterator[int]:
        """The endless list of shards of one rank."""
        count = len(self._manifest.shards)
        place = rank
        while True:
            epoch, inside = divmod(place, count)
            yield int(permute(np.array([inside]), size=count, seed=seed, epoch=epoch, purpose="shards")[0])
            place += world_size

    def _samples(self, seed: int, consumed: int, rank: int, world_size: int) -> Iterator[tuple[int, bytes, int]]:
        """(sample, image file, label) of one rank, from the shard in which `consumed` samples of it ended."""
        for shard in self._shard_list(seed, rank, world_size):
            if consumed >= self._manifest.shards[shard].samples:
                consumed -= self._manifest.shards[shard].samples
                continue
            consumed = 0
            yield from self._read_shard(shard)

    def _read_shard(self, shard: int) -> Iterator[tuple[int, bytes, int]]:
        """Samples of one shard; a connection that breaks is made anew and what was delivered is passed over."""
        entry = self._manifest.shards[shard]
        found: list[tuple[bytes, int]] = []

        def fetch() -> None:
            found.clear()
            with closing(self._files.open(entry.name)) as stream:
                members = webdataset.tariterators.tar_file_expander([{"url": entry.name, "stream": stream}])
                found.extend(self._sample(entry.name, s) for s in webdataset.tariterators.group_by_keys(members))
            if len(found) != entry.samples:
                raise EOFError(f"{len(found)} of {entry.samples} samples arrived")

        self._files.retry(entry.name, fetch)
        start = int(self._starts[shard])
        for number, (data, label) in enumerate(found):
            yield start + number, data, label

    def _sample(self, shard: str, sample: dict[str, bytes]) -> tuple[bytes, int]:
        image = next((data for suffix, data in sample.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
        label = sample.get("cls", b"")
        where = f"{shard}: sample {sample['__key__']!r}"
        if image is None or not label.isdigit():
            raise DataError(f"{where} holds no image with a .cls label; run `aroface verify` where the shards lie.")
        if int(label) >= self.num_classes:
            raise DataError(f"{where} has label {int(label)}; the manifest has {self.num_classes} classes.")
        return image, int(label)

    def _shuffled(
        self, samples: Iterator[tuple[int, bytes, int]], seed: int, rank: int
    ) -> Iterator[tuple[int, bytes, int]]:
        """An endless stream in which each sample waits a random time in a buffer."""
        source = random.Random(f"{seed} {rank}")  # noqa: S311 - an order, no secret
        buffer = [next(samples) for _ in range(self._buffer_samples)]
        while True:
            place = source.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = next(samples)
