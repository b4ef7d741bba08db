"""An exported ONNX file as an embedder, on ONNX Runtime. Imports no torch."""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from aroface.contract import InputContract
from aroface.errors import ExportError
from export.metadata import ModelMetadata

__all__ = ["OnnxEmbedder"]

_PREFERRED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_LOG_ERRORS_ONLY = 3


class OnnxEmbedder:
    """`aroface.types.Embedder` on ONNX Runtime.

    Args:
        path: a file that `aroface export` wrote.
        threads: CPU threads of one call; None leaves it to ONNX Runtime (all cores).
        batch_size: largest batch that goes through the network at once; memory, not the result.

    Raises:
        ExportError: the file is missing, is not ONNX, or carries no contract.
    """

    def __init__(self, path: Path, *, threads: int | None = None, batch_size: int = 64) -> None:
        if not path.is_file():
            raise ExportError(
                f"{path} does not exist; make it with `aroface export CHECKPOINT --to onnx --out {path}`."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        # Waiting threads that spin slow down the decoding threads beside them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        available = onnxruntime.get_available_providers()
        providers = [provider for provider in _PREFERRED_PROVIDERS if provider in available]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise ExportError(f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {error}") from error
        self.metadata = ModelMetadata.from_props(self._session.get_modelmeta().custom_metadata_map, name=str(path))
        self._contract = self.metadata.contract
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
        fused = "-flip" if self.metadata.flip_fusion else ""
        return f"{self.metadata.model_id}-onnx-{self.metadata.precision}{fused}"

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 RGB to (B, D) float32, un-normalised."""
        return self.embed_with_norm(images)[0]

    def embed_with_norm(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(B, S, S, 3) uint8 RGB to both outputs: embeddings (B, D) and their norms (B,), float32."""
        self._contract.check_images(images)
        embeddings = np.empty((len(images), self.embedding_dim), np.float32)
        norms = np.empty(len(images), np.float32)
        names = [self.metadata.output_embedding, self.metadata.output_norm]
        for start in range(0, len(images), self._batch_size):
            part = slice(start, min(start + self._batch_size, len(images)))
            feed = {self.metadata.input_name: self._prepare(images[part])}
            embeddings[part], norms[part] = self._session.run(names, feed)
        return embeddings, norms

    def _prepare(self, images: NDArray[np.uint8]) -> NDArray[np.uint8] | NDArray[np.float32]:
        if self.metadata.input_layout == "uint8_nhwc":
            return np.ascontiguousarray(images)
        ordered = images[..., ::-1] if self._contract.colour_order == "bgr" else images
        pixels = (ordered.astype(np.float32) - np.float32(self._contract.mean)) / np.float32(self._contract.std)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
