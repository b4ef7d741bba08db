"""Checkpoint -> one self-contained ONNX file that equals it, or no file.

The graph holds everything between the pixels and the two outputs: channel order and normalisation (for uint8 input),
the backbone without any batch norm, optionally the fusion with the mirror image. The body computes in fp32, fp16, bf16
or int8; the precision stands in the graph, so that every runtime computes the same.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aroface import __version__
from aroface.contract import InputContract
from aroface.errors import ExportError
from aroface.files import atomic_path
from aroface.inference import TorchEmbedder, TrainedModel
from aroface.preprocess import normalise
from export.accuracy import AccuracyGate, AccuracyReport, check_accuracy
from export.embedder import ExportedEmbedder
from export.fold_batch_norm import fold_batch_norms
from export.half_precision import to_half_precision
from export.metadata import FORMAT_VERSION, InputLayout, ModelMetadata, Precision, QuantisationTarget
from export.openvino_runtime import OpenVinoEmbedder
from export.parity import ParityReport, check_parity
from export.quantise import quantise, scales_sha256
from export.runtime import OnnxEmbedder

__all__ = [
    "MIN_BF16_OPSET_VERSION",
    "MAX_OPSET_VERSION",
    "MIN_OPSET_VERSION",
    "OPSET_VERSION",
    "OnnxExport",
    "OnnxSettings",
    "build_onnx",
    "export_onnx",
    "finish_onnx",
    "make_onnx",
    "open_for_gates",
]

#: The newest that ONNX Runtime 1.32 and TensorRT (11.5) both read, and that the exporter of PyTorch writes.
OPSET_VERSION = 25
#: The newest that ONNX Runtime 1.32 reads.
MAX_OPSET_VERSION = 28
#: The same with int8: 1.32 has no kernel of DequantizeLinear(28).
MAX_INT8_OPSET_VERSION = 27
#: Read by ONNX Runtime from 1.17 and TensorRT from 10.0 on.
MIN_OPSET_VERSION = 20
#: The first with bf16 convolutions.
MIN_BF16_OPSET_VERSION = 22

_MAX_FILE_BYTES = (1 << 31) - 1  # a protobuf message, and so a self-contained ONNX file, ends at 2 GiB
_MAX_TRACED_BATCH = 4096  # bound for the tracer only; the graph takes any batch

_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnnxSettings:
    """What the exported graph takes and gives."""

    input_layout: InputLayout = "uint8_nhwc"
    flip_fusion: bool = False  #: the embedding is e(x) + e(mirrored x)
    precision: Precision = "fp32"
    quantisation: QuantisationTarget = "cpu"  #: for int8: which runtime the scales are placed for
    opset_version: int = OPSET_VERSION


@dataclass(frozen=True)
class OnnxExport:
    """What the gates found."""

    parity: ParityReport
    accuracy: AccuracyReport | None  #: None where no set was given


class _ExportedGraph(nn.Module):
    """images -> (embedding, norm), as one traceable module."""

    def __init__(self, backbone: nn.Module, contract: InputContract, settings: OnnxSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self._contract = contract
        self._settings = settings

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = normalise(images, self._contract) if self._settings.input_layout == "uint8_nhwc" else images
        if self._settings.flip_fusion:
            both: Tensor = self.backbone(torch.cat([x, x.flip(3)]))
            embedding = both[: x.shape[0]] + both[x.shape[0] :]
        else:
            embedding = self.backbone(x)
        return embedding, torch.linalg.vector_norm(embedding, dim=1)


def export_onnx(
    model: TrainedModel,
    path: Path,
    faces: NDArray[np.uint8],
    settings: OnnxSettings | None = None,
    *,
    calibration: NDArray[np.uint8] | None = None,
    gate: AccuracyGate | None = None,
) -> OnnxExport:
    """Write `path`, after the graph has shown the same embeddings as the checkpoint on `faces`.

    Args:
        model: the checkpoint, on the CPU.
        path: the .onnx file; replaced atomically.
        faces: (N, S, S, 3) uint8 RGB, N >= `NUM_PARITY_FACES`, for the parity gate.
        settings: input, precision and so on; the default is uint8 input, fp32, without fusion.
        calibration: (N, S, S, 3) uint8 RGB: the faces that int8 takes its ranges from.
        gate: rates that may not fall; int8 needs it.

    Raises:
        ExportError: a setting cannot be had, the graph is invalid or too large, or it differs from the checkpoint by
            more than the gates allow. No file is left then.
    """
    settings = settings or OnnxSettings()
    if settings.precision == "int8" and gate is None:
        raise ExportError(
            "int8 changes every embedding, so it needs a set to show what that costs: name faces of at least two "
            "images per identity with --accuracy-set."
        )
    proto = make_onnx(model, settings, calibration)
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        reference = TorchEmbedder(model, device="cpu")
        exported = open_for_gates(temporary, settings.precision)
        parity = check_parity(reference, exported, faces)
        return OnnxExport(parity, None if gate is None else check_accuracy(reference, exported, gate))


def make_onnx(
    model: TrainedModel, settings: OnnxSettings, calibration: NDArray[np.uint8] | None = None
) -> onnx.ModelProto:
    """The finished graph in its precision, checked but not compared with the checkpoint.

    Raises:
        ExportError: a setting cannot be had, or the graph is invalid or too large.
    """
    _check_settings(settings)
    return finish_onnx(build_onnx(model, settings), model, settings, calibration)


def finish_onnx(
    proto: onnx.ModelProto, model: TrainedModel, settings: OnnxSettings, calibration: NDArray[np.uint8] | None = None
) -> onnx.ModelProto:
    """The graph of `build_onnx` in its precision, checked.

    Raises:
        ExportError: the graph is invalid or too large, or int8 has too few faces for calibration.
    """
    metadata = _describe(model, settings)
    if settings.precision == "int8":
        faces = np.empty((0, 1, 1, 3), np.uint8) if calibration is None else calibration
        proto = quantise(proto, metadata, faces, settings.quantisation)
        metadata = metadata.model_copy(update={"scales_sha256": scales_sha256(proto)})
    elif settings.precision != "fp32":
        proto = to_half_precision(proto, settings.precision)
    _stamp(proto, metadata)
    if proto.ByteSize() > _MAX_FILE_BYTES:
        raise ExportError(
            f"The model takes {proto.ByteSize() / 2**30:.2f} GiB; one ONNX file holds at most 2 GiB. "
            "Lower model.width or model.image_size."
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error
    return proto


def build_onnx(model: TrainedModel, settings: OnnxSettings) -> onnx.ModelProto:
    """The graph in fp32, without batch norms; the same model and settings give the same bytes."""
    side = model.contract.image_size
    graph = _ExportedGraph(model.backbone, model.contract, settings).eval()
    example = (
        torch.zeros(2, side, side, 3, dtype=torch.uint8)
        if settings.input_layout == "uint8_nhwc"
        else torch.zeros(2, 3, side, side)
    )
    metadata = _describe(model, settings)
    batch = torch.export.Dim("batch", min=1, max=_MAX_TRACED_BATCH)
    with _quiet_exporter():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=[metadata.input_name],
            output_names=[metadata.output_embedding, metadata.output_norm],
            opset_version=min(settings.opset_version, OPSET_VERSION),
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program; report this with the versions of `aroface doctor`.")
    proto: onnx.ModelProto = program.model_proto
    _drop_trace(proto)
    if settings.opset_version > OPSET_VERSION:
        proto = onnx.version_converter.convert_version(proto, settings.opset_version)
    fold_batch_norms(proto)
    _stamp(proto, metadata)
    return proto


def _check_settings(settings: OnnxSettings) -> None:
    lowest = MIN_BF16_OPSET_VERSION if settings.precision == "bf16" else MIN_OPSET_VERSION
    highest = MAX_INT8_OPSET_VERSION if settings.precision == "int8" else MAX_OPSET_VERSION
    if not lowest <= settings.opset_version <= highest:
        raise ExportError(
            f"--opset {settings.opset_version} cannot be had for {settings.precision}; {lowest} to {highest} can."
        )


def open_for_gates(path: Path, precision: Precision) -> ExportedEmbedder:
    """The file on a runtime that computes it as it stands: ONNX Runtime, whose processor kernels know no bf16 though.

    Raises:
        ExportError: the file is damaged, or bf16 needs OpenVINO and it is not installed.
    """
    threads = torch.get_num_threads()
    if precision == "bf16":
        return OpenVinoEmbedder(path, precision="bf16", threads=threads)
    return OnnxEmbedder(path, threads=threads)


def _describe(model: TrainedModel, settings: OnnxSettings) -> ModelMetadata:
    return ModelMetadata(
        format_version=FORMAT_VERSION,
        aroface_version=__version__,
        model_id=model.model_id,
        checkpoint_sha256=model.weights_sha256,
        input_layout=settings.input_layout,
        embedding_dim=model.backbone.embedding_dim,
        flip_fusion=settings.flip_fusion,
        precision=settings.precision,
        quantisation=settings.quantisation if settings.precision == "int8" else None,
        **model.contract.model_dump(),
    )


def _stamp(proto: onnx.ModelProto, metadata: ModelMetadata) -> None:
    onnx.helper.set_model_props(proto, metadata.to_props())
    proto.producer_name, proto.producer_version = "aroface", __version__


def _drop_trace(proto: onnx.ModelProto) -> None:
    """Remove what the tracer noted down: source paths of this machine, which also would make the bytes differ."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Send what the exporter prints to the debug log, and hold back its notes on packages we do not use."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if printed.getvalue():
            _log.debug("%s", printed.getvalue().rstrip())
