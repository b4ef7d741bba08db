"""The data loader of arcface_torch, by its own code from a checkout, with stand-ins for packages that cannot be had.

MXNet has no build for current Pythons: the three names that `dataset.py` takes from it are stated here, decoding by
OpenCV, which MXNet uses too. torchvision is used where it is installed; else the four transforms are stated here, as
torchvision computes them. Without a GPU, CUDA streams do nothing and batches stay in memory.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from launch.bench.records import FRAME, HEADER
from tests.peers.public_code import importable


def replaced() -> tuple[str, ...]:
    """What differs from their run on this machine."""
    found = ["mxnet: record reader by offsets and OpenCV's JPEG decoder"]
    if not _has_torchvision():
        found.append("torchvision: its four transforms, stated plainly over PIL and PyTorch")
    if not torch.cuda.is_available():
        found.append("CUDA streams and the copy to the device: nothing happens")
    return tuple(found)


@contextlib.contextmanager
def arcface_loader(folder: Path, records: Path, *, batch_size: int, workers: int) -> Iterator[Iterator[torch.Tensor]]:
    """Float batches of one epoch from `get_dataloader` of the folder that holds `train_v2.py`."""
    has_gpu = torch.cuda.is_available()
    with importable(folder, "dataset", "utils", stand_ins=_stand_ins()), _streams():
        loader = importlib.import_module("dataset").get_dataloader(
            str(records), 0 if has_gpu else "cpu", batch_size, num_workers=workers
        )
        yield (images for images, _ in loader)


def _stand_ins() -> dict[str, dict[str, Any]]:
    recordio = SimpleNamespace(MXIndexedRecordIO=_Records, unpack=_unpack)
    found: dict[str, dict[str, Any]] = {
        "mxnet": {"recordio": recordio, "image": SimpleNamespace(imdecode=_decode)},
    }
    if not _has_torchvision():
        transforms = SimpleNamespace(
            Compose=_Compose,
            ToPILImage=lambda: Image.fromarray,
            RandomHorizontalFlip=lambda: _flip,
            ToTensor=lambda: _to_tensor,
            Normalize=_normalise,
        )
        found["torchvision"] = {"transforms": transforms}
        found["torchvision.datasets"] = {"ImageFolder": None}
    return found


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    stream = SimpleNamespace(wait_stream=lambda other: None)
    with (
        mock.patch.object(torch.cuda, "Stream", return_value=stream),
        mock.patch.object(torch.cuda, "stream", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        mock.patch.object(torch.cuda, "set_device", return_value=None),
    ):
        yield


class _Header(NamedTuple):
    flag: int
    label: float
    id: int
    id2: int


class _Records:
    """`MXIndexedRecordIO` for reading."""

    def __init__(self, index: str, records: str, mode: str) -> None:
        assert mode == "r"
        self._path = records
        lines = Path(index).read_text(encoding="utf-8").splitlines()
        self._offsets = {int(key): int(offset) for key, offset in (line.split("\t") for line in lines)}
        self.keys = list(self._offsets)
        self._file: io.BufferedReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read_idx(self, key: int) -> bytes:
        if self._file is None:
            self._file = Path(self._path).open("rb")  # noqa: SIM115 - stays open, as theirs does
        self._file.seek(self._offsets[key])
        _, length = FRAME.unpack(self._file.read(FRAME.size))
        return self._file.read(length)


def _unpack(record: bytes) -> tuple[_Header, bytes]:
    return _Header(*HEADER.unpack_from(record)), record[HEADER.size :]


def _decode(image: bytes) -> SimpleNamespace:
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return SimpleNamespace(asnumpy=lambda: pixels)


class _Compose:
    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self._steps = steps

    def __call__(self, image: NDArray[np.uint8]) -> Any:
        result: Any = image
        for step in self._steps:
            result = step(result)
        return result


def _flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1).item() < 0.5 else image


def _to_tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _normalise(mean: list[float], std: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    def step(image: torch.Tensor) -> torch.Tensor:
        centre, spread = (torch.as_tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
        return image.clone().sub_(centre).div_(spread)

    return step
