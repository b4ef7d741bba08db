"""How other projects feed a training step, rebuilt plainly from their description, to be measured beside ours.

`arcface_batches` does per sample what InsightFace's arcface_torch does: read a record by its offset, decode it with
OpenCV as MXNet does (or with PIL, as its reader of image folders), make a PIL image, flip it half of the time, turn it
into a float tensor of planes and normalise that; worker processes of a `DataLoader` collate the batch.
`webdataset_batches` is the pipeline of WebDataset's own documentation: shuffle buffer, `decode("torchrgb")`, tuples,
batches.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from aroface.errors import DataError
from launch.bench.records import FRAME, HEADER

__all__ = ["arcface_batches", "webdataset_batches"]


Decoder = Literal["opencv", "pil"]


class _RecordFaces(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One float tensor per sample."""

    def __init__(self, folder: Path, decoder: Decoder) -> None:
        self._decoder = decoder
        self._path = folder / "train.rec"
        lines = (folder / "train.idx").read_text(encoding="utf-8").splitlines()
        self._offsets = [int(line.split("\t")[1]) for line in lines]
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._file is None:  # every worker opens its own
            self._file = self._path.open("rb")
        self._file.seek(self._offsets[index])
        _, length = FRAME.unpack(self._file.read(FRAME.size))
        record = self._file.read(length)
        _, label, _, _ = HEADER.unpack_from(record)
        image = self._decode(record[HEADER.size :])
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        planes = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        sample = planes.to(torch.float32).div(255).sub_(0.5).div_(0.5)
        return sample, torch.tensor(int(label), dtype=torch.long)

    def _decode(self, image: bytes) -> Image.Image:
        if self._decoder == "pil":
            return Image.open(io.BytesIO(image)).convert("RGB")
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise DataError(f"{self._path} holds a record that is no image.")
        return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def arcface_batches(
    folder: Path, *, batch_size: int, workers: int, decoder: Decoder = "opencv"
) -> Iterator[Sequence[torch.Tensor]]:
    """Float batches of one epoch in random order, the last incomplete one left out."""
    data = _RecordFaces(folder, decoder)
    yield from DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True)


def webdataset_batches(shards: Sequence[Path], *, batch_size: int, workers: int) -> Iterator[Sequence[torch.Tensor]]:
    """Float batches of one epoch through a shuffle buffer of 1000 samples, incomplete ones left out."""
    import webdataset as wds

    stream = (
        wds.WebDataset([str(path) for path in shards], shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("torchrgb")
        .to_tuple("jpg", "cls")
        .batched(batch_size, partial=False)
    )
    yield from wds.WebLoader(stream, batch_size=None, num_workers=workers)
