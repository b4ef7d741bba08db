"""An fp32 graph as int8 with explicit scales (QuantizeLinear and DequantizeLinear), calibrated on faces.

Convolutions and linear layers with constant weights are quantised, weights per output channel; the neck stays fp32 (see
`export.half_precision`). Where the scales stand is a matter of the runtime:

- `cpu`: activations uint8 with a zero point, also behind each layer. ONNX Runtime and OpenVINO make whole int8 layers
  of that.
- `tensorrt`: activations int8, symmetric, in front of each layer only, as TensorRT wants them.
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from aroface.errors import ExportError
from export.half_precision import neck_nodes
from export.metadata import ModelMetadata, QuantisationTarget
from export.preprocessing import prepare_batch

__all__ = ["MIN_CALIBRATION_FACES", "quantise", "scales_sha256"]

#: Fewer do not show the range of the activations.
MIN_CALIBRATION_FACES = 32
_LAYERS = ["Conv", "Gemm", "MatMul"]
_BATCH_SIZE = 8


def quantise(
    proto: onnx.ModelProto, metadata: ModelMetadata, faces: NDArray[np.uint8], target: QuantisationTarget
) -> onnx.ModelProto:
    """A quantised copy of an fp32 graph.

    Args:
        proto: the graph, with its batch norms folded.
        metadata: of the graph: how faces become its input.
        faces: (N, S, S, 3) uint8 RGB, N >= `MIN_CALIBRATION_FACES`; the range of every activation is taken from them.
        target: which runtime the scales are placed for.

    Raises:
        ExportError: too few faces.
    """
    if len(faces) < MIN_CALIBRATION_FACES:
        raise ExportError(
            f"int8 was to be calibrated on {len(faces)} faces; at least {MIN_CALIBRATION_FACES} are needed, a few "
            "hundred are usual. Name a larger set with --calibration."
        )
    extra: dict[str, Any] = {"MatMulConstBOnly": True}
    if target == "tensorrt":
        extra |= {"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": _LAYERS}
    with tempfile.TemporaryDirectory(prefix="aroface-int8-") as folder, _quiet():
        result = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            result,
            _Faces(metadata, faces),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_LAYERS,
            nodes_to_exclude=[node.name for node in neck_nodes(proto)],
            per_channel=True,
            activation_type=QuantType.QInt8 if target == "tensorrt" else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=extra,
        )
        quantised = onnx.load(result)
    del quantised.graph.value_info[:]
    _drop_repeated_types(quantised)
    return quantised


def scales_sha256(proto: onnx.ModelProto) -> str:
    """Hash of all scales and zero points, in the order of the graph: what calibration decides about the embeddings."""
    values = {initializer.name: initializer for initializer in proto.graph.initializer}
    digest = hashlib.sha256()
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.input[1:]:
                digest.update(onnx.numpy_helper.to_array(values[name]).tobytes())
    return digest.hexdigest()


def _drop_repeated_types(proto: onnx.ModelProto) -> None:
    """The zero point tells the type already; ONNX Runtime changes the one on loading and not the other."""
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2:
            for attribute in [attribute for attribute in node.attribute if attribute.name == "output_dtype"]:
                node.attribute.remove(attribute)


class _Faces(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Batches of the network's input."""

    def __init__(self, metadata: ModelMetadata, faces: NDArray[np.uint8]) -> None:
        self._name = metadata.input_name
        self._batches = (
            prepare_batch(faces[start : start + _BATCH_SIZE], metadata) for start in range(0, len(faces), _BATCH_SIZE)
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next batch, None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantiser's advice to run a preprocessing that the graph has had."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
