"""An exported ONNX file as an embedder, on ONNX Runtime. Imports no torch, but to count GPUs for several ranks."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from aroface.devices import local_rank, own_gpu
from aroface.errors import ExportError
from export.embedder import ExportedEmbedder
from export.metadata import ModelMetadata
from export.onnx_file import require_file

__all__ = ["OnnxEmbedder"]

_FATAL_ONLY = 4
#: Copies int8 quantisers behind a pooling layer; another pass makes them uint8 and forgets the type that they repeat.
_MOVES_QUANTISERS = "QDQPropagationTransformer"


class OnnxEmbedder(ExportedEmbedder):
    """`aroface.types.Embedder` on ONNX Runtime; with CUDA on the GPU of the local rank, or the first.

    Args:
        path: a file that `aroface export` wrote.
        threads: CPU threads of one call; None leaves it to ONNX Runtime (all cores).
        batch_size: largest batch that goes through the network at once; memory, not the result.

    Raises:
        ExportError: the file is missing, is not ONNX, carries no contract, or has a type that ONNX Runtime lacks.
    """

    def __init__(self, path: Path, *, threads: int | None = None, batch_size: int = 64) -> None:
        require_file(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY  # what goes wrong is raised as well
        if threads is not None:
            options.intra_op_num_threads = threads
        # Waiting threads that spin slow down the decoding threads beside them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = _providers(onnxruntime.get_available_providers())
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=providers, disabled_optimizers=[_MOVES_QUANTISERS]
            )
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise ExportError(_explain(path, error)) from error
        metadata = ModelMetadata.from_props(self._session.get_modelmeta().custom_metadata_map, name=str(path))
        super().__init__(self._run, metadata, runtime="onnx", batch_size=batch_size)

    def _run(self, batch: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        names = [self.metadata.output_embedding, self.metadata.output_norm]
        embeddings, norms = self._session.run(names, {self.metadata.input_name: batch})
        return embeddings, norms


def _providers(available: Collection[str]) -> list[str | tuple[str, dict[str, int]]]:
    """The preferred ones, best first. Rank 0 has the first GPU however many there are, and need not count them."""
    gpu = local_rank() and "CUDAExecutionProvider" in available and own_gpu()
    preferred = {"CUDAExecutionProvider": {"device_id": gpu or 0}, "CPUExecutionProvider": {}}
    return [(name, settings) if settings else name for name, settings in preferred.items() if name in available]


def _explain(path: Path, error: Exception) -> str:
    text = f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {error}"
    if "NOT_IMPLEMENTED" in str(error):
        text += (
            ". Its kernels for this machine lack the type of the model; run a bf16 model with --runtime openvino, or "
            "export with --precision fp16 or fp32."
        )
    return text
