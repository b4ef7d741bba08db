"""An exported ONNX file as an embedder, on OpenVINO: the fastest way on Intel and AMD processors. Imports no torch."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ExportError
from export.embedder import ExportedEmbedder
from export.onnx_file import read_onnx

__all__ = ["OpenVinoEmbedder", "OpenVinoPrecision"]

#: fp32: as exact as the file. bf16: sums in fp32, products in bf16, where the processor has it (AVX-512 BF16, AMX).
OpenVinoPrecision = Literal["fp32", "bf16"]

_HINTS = {"fp32": "f32", "bf16": "bf16"}


@cache
def _core() -> Any:
    """One for the whole process.

    On processors with AMX its CPU plugin gives the calling thread a signal stack of its own; plugins freed in another
    order than they were made leave the thread with the address of a freed one, and the next signal kills the process.
    """
    import openvino

    return openvino.Core()


class OpenVinoEmbedder(ExportedEmbedder):
    """`aroface.types.Embedder` on OpenVINO, on the processor.

    Args:
        path: a file that `aroface export` wrote.
        precision: arithmetic of a file in floating point; int8 layers stay int8.
        threads: CPU threads of one call; None leaves it to OpenVINO.
        batch_size: largest batch that goes through the network at once; memory, not the result.

    Raises:
        ExportError: OpenVINO is not installed, or the file is missing, not ONNX, or carries no contract.
    """

    def __init__(
        self,
        path: Path,
        *,
        precision: OpenVinoPrecision = "fp32",
        threads: int | None = None,
        batch_size: int = 64,
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ExportError(
                "OpenVINO is not installed; `pip install openvino` adds it. The same file runs on ONNX Runtime without "
                "it, unless its precision is bf16."
            ) from error
        metadata = read_onnx(path)[1]
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "NUM_STREAMS": 1}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        core = _core()
        try:
            self._compiled = core.compile_model(core.read_model(str(path)), "CPU", properties)
        except RuntimeError as error:
            raise ExportError(f"{path} cannot be loaded by OpenVINO {openvino.__version__}: {error}") from error
        self._request = self._compiled.create_infer_request()
        runtime = "openvino" if precision == "fp32" else f"openvino_{precision}"
        super().__init__(self._run, metadata, runtime=runtime, batch_size=batch_size)

    def _run(self, batch: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        results = self._request.infer({self.metadata.input_name: batch})
        # The arrays belong to the request and are overwritten by its next call.
        return np.array(results[self.metadata.output_embedding]), np.array(results[self.metadata.output_norm])
