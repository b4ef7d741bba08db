"""What the runners of exported models have in common: the contract, batches, and names."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.contract import InputContract
from export.metadata import ModelMetadata
from export.preprocessing import prepare_batch

__all__ = ["ExportedEmbedder", "Runner"]


class Runner(Protocol):
    """One runtime with a model in it."""

    def __call__(self, batch: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A batch as the graph takes it to its two outputs, (B, D) and (B,)."""
        ...


class ExportedEmbedder:
    """`aroface.types.Embedder` on any runtime.

    Args:
        runner: computes one batch.
        metadata: of the model.
        runtime: its name in `model_id`, such as `onnx`.
        batch_size: largest batch that goes through the network at once; memory, not the result.
    """

    def __init__(self, runner: Runner, metadata: ModelMetadata, *, runtime: str, batch_size: int) -> None:
        self._runner = runner
        self.metadata = metadata
        self._contract = metadata.contract
        self._runtime = runtime
        self._batch_size = batch_size

    @property
    def contract(self) -> InputContract:
        """What the network expects; `embed` applies it."""
        return self._contract

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.metadata.embedding_dim

    @property
    def model_id(self) -> str:
        """Short name and hash of the exported checkpoint, with what was added on export."""
        scales = "" if self.metadata.scales_sha256 is None else f"-{self.metadata.scales_sha256[:8]}"
        fused = "-flip" if self.metadata.flip_fusion else ""
        return f"{self.metadata.model_id}-{self._runtime}-{self.metadata.precision}{scales}{fused}"

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 RGB to (B, D) float32, un-normalised."""
        return self.embed_with_norm(images)[0]

    def embed_with_norm(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(B, S, S, 3) uint8 RGB to both outputs: embeddings (B, D) and their norms (B,), float32."""
        self._contract.check_images(images)
        embeddings = np.empty((len(images), self.embedding_dim), np.float32)
        norms = np.empty(len(images), np.float32)
        for start in range(0, len(images), self._batch_size):
            part = slice(start, min(start + self._batch_size, len(images)))
            embeddings[part], norms[part] = self._runner(prepare_batch(images[part], self.metadata))
        return embeddings, norms
