"""The few shapes that packages hand to one another.

Legend: N images of a set, B batch, H W height and width, D embedding dimension. `launch` connects the two sides of each
protocol, so that `shards`, `export`, `retrieval` and the trainer need not know one another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.contract import InputContract

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch", "Embedder", "Evaluator", "FaceSet", "TrainingData"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as the loader delivers it."""

    images: Tensor  #: (B, H, W, 3) uint8 RGB
    labels: Tensor  #: (B,) int64 class indices
    samples: Tensor  #: (B,) int64 indices into the data set; `TrainingData.describe` names them


class TrainingData(Protocol):
    """A labelled image set whose order is a pure function of (seed, position).

    Position p of the stream is sample `permutation(seed, epoch)(p mod num_samples)` of epoch `p // num_samples`. With
    global batches of G images, rank r of W takes the positions congruent to r modulo W, so every rank runs the same
    number of steps, every sample is seen exactly once per epoch, and a resume needs one integer.
    """

    @property
    def num_samples(self) -> int:
        """Images in one epoch."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes; every label is in [0, num_classes)."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: equal exactly when the data are."""
        ...

    def batches(
        self, *, seed: int, start_position: int, num_batches: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """Micro-batches of `batch_size` per rank, from global position `start_position` on."""
        ...

    def describe(self, sample: int) -> str:
        """Where a sample lies, such as `train-000003.tar: 00001234`."""
        ...


class Embedder(Protocol):
    """Anything that turns face crops into embeddings: a checkpoint, an ONNX file, an engine."""

    @property
    def contract(self) -> InputContract:
        """What the model expects; `embed` already applies it to RGB input."""
        ...

    @property
    def embedding_dim(self) -> int:
        """D."""
        ...

    @property
    def model_id(self) -> str:
        """Short name and hash, for result files."""
        ...

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 RGB crops, S = contract.image_size, to (B, D) float32 un-normalised embeddings."""
        ...


class Evaluator(Protocol):
    """One evaluation set that training asks now and then."""

    @property
    def name(self) -> str:
        """What the metrics log calls it."""
        ...

    def metric_names(self) -> Collection[str]:
        """What `evaluate` gives a number for, known without a model; what is null on this set is left out."""
        ...

    def evaluate(self, embedder: Embedder) -> Mapping[str, float | None]:
        """The numbers of a model, by name. Called on all ranks at once with equal models; all ranks get the same."""
        ...


class FaceSet(Protocol):
    """Named face images grouped by identity, from any source layout."""

    @property
    def keys(self) -> Sequence[str]:
        """(N,) unique names, such as `identity/image.jpg`."""
        ...

    @property
    def identities(self) -> Sequence[str]:
        """(N,) identity of each image."""
        ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, (H, W, 3) uint8 RGB."""
        ...
