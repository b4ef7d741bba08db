"""Checkpoint -> one self-contained ONNX file that equals it, or no file.

The graph holds everything between the pixels and the two outputs: channel order and normalisation (for uint8 input),
the backbone with its batch norms folded into the convolutions, optionally the fusion with the mirror image.
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
from export.metadata import FORMAT_VERSION, InputLayout, ModelMetadata
from export.parity import ParityReport, check_parity
from export.runtime import OnnxEmbedder

__all__ = ["OPSET_VERSION", "OnnxSettings", "build_onnx", "export_onnx"]

#: Read by ONNX Runtime from 1.17 and TensorRT from 10.0 on.
OPSET_VERSION = 20

_MAX_FILE_BYTES = (1 << 31) - 1  # a protobuf message, and so a self-contained ONNX file, ends at 2 GiB
_MAX_TRACED_BATCH = 4096  # bound for the tracer only; the graph takes any batch

_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnnxSettings:
    """What the exported graph takes and gives."""

    input_layout: InputLayout = "uint8_nhwc"
    flip_fusion: bool = False  #: the embedding is e(x) + e(mirrored x)


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
    model: TrainedModel, path: Path, faces: NDArray[np.uint8], settings: OnnxSettings | None = None
) -> ParityReport:
    """Write `path`, after the graph has shown the same embeddings as the checkpoint on `faces`.

    Args:
        model: the checkpoint, on the CPU.
        path: the .onnx file; replaced atomically.
        faces: (N, S, S, 3) uint8 RGB, N >= 12, for the parity gate.
        settings: input layout and flip fusion; the default is uint8 input without fusion.

    Raises:
        ExportError: the graph is invalid, too large, or differs from the checkpoint. No file is left then.
    """
    settings = settings or OnnxSettings()
    proto = build_onnx(model, settings)
    if proto.ByteSize() > _MAX_FILE_BYTES:
        raise ExportError(
            f"The model takes {proto.ByteSize() / 2**30:.2f} GiB; one ONNX file holds at most 2 GiB. "
            "Lower model.width or model.image_size."
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        return check_parity(
            TorchEmbedder(model, device="cpu"),
            OnnxEmbedder(temporary, threads=torch.get_num_threads()),
            faces,
        )


def build_onnx(model: TrainedModel, settings: OnnxSettings) -> onnx.ModelProto:
    """The graph with its metadata; the same model and settings give the same bytes."""
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
            opset_version=OPSET_VERSION,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program; report this with the versions of `aroface doctor`.")
    proto: onnx.ModelProto = program.model_proto
    _drop_trace(proto)
    onnx.helper.set_model_props(proto, metadata.to_props())
    proto.producer_name, proto.producer_version = "aroface", __version__
    return proto


def _describe(model: TrainedModel, settings: OnnxSettings) -> ModelMetadata:
    return ModelMetadata(
        format_version=FORMAT_VERSION,
        aroface_version=__version__,
        model_id=model.model_id,
        checkpoint_sha256=model.weights_sha256,
        input_layout=settings.input_layout,
        embedding_dim=model.backbone.embedding_dim,
        flip_fusion=settings.flip_fusion,
        precision="fp32",
        **model.contract.model_dump(),
    )


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
