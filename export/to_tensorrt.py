"""ONNX -> TensorRT engine, on the GPU that will run it, behind the same gates as the ONNX file; or no file.

Networks are strongly typed: the precision stands in the ONNX graph (fp16, bf16, or int8 with symmetric scales), and
TensorRT keeps to it. TensorRT 11 knows no other way, and for 10 it is asked for. TF32 is off, so fp32 is fp32.
"""

import hashlib
import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from aroface.errors import ExportError
from aroface.files import atomic_path, write_json
from aroface.types import Embedder
from export.accuracy import AccuracyGate, AccuracyReport, check_accuracy
from export.engine_record import ENGINE_FORMAT_VERSION, BatchProfile, EngineRecord, record_path
from export.metadata import ModelMetadata, Precision
from export.parity import ParityReport, check_parity
from export.tensorrt_probe import GpuState, require_tensorrt
from export.tensorrt_runtime import TensorRtEmbedder, make_logger, new_stream
from export.to_onnx import MIN_BF16_OPSET_VERSION, MIN_OPSET_VERSION

__all__ = ["DEFAULT_PROFILES", "EngineExport", "EngineSettings", "build_plan", "export_tensorrt", "opset_for"]

#: One for a single face, one for filled batches.
DEFAULT_PROFILES = (BatchProfile(minimum=1, optimum=1, maximum=8), BatchProfile(minimum=1, optimum=64, maximum=64))

_GIB = 1 << 30
#: The first release whose parser reads an opset: docs/operators.md of onnx-tensorrt at the commit of the release (10.0
#: and 10.1: 20; 10.14, c727277: 24; 10.15 and 11.1, 7c51a63: 24), and the release notes of 11.5 (25). What lies between
#: 10.1 and 10.14 could not be looked up, and gets what 10.0 reads.
_NEWEST_OPSETS = (((11, 5), 25), ((10, 14), 24))
_OPTIMISATION_LEVELS = range(6)


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built."""

    profiles: tuple[BatchProfile, ...] = DEFAULT_PROFILES
    workspace_gib: float | None = None  #: upper bound on scratch memory of the GPU; None leaves it to TensorRT
    timing_cache: Path | None = None  #: read if it is there, written after the build: a second build is much faster
    optimisation_level: int | None = None  #: 0 to 5, how long to search for fast kernels; None: TensorRT's default, 3


@dataclass(frozen=True)
class EngineExport:
    """What was built, and what the gates found."""

    record: EngineRecord
    parity: ParityReport
    accuracy: AccuracyReport | None  #: None where no set was given


def export_tensorrt(
    proto: onnx.ModelProto,
    path: Path,
    reference: Embedder,
    faces: NDArray[np.uint8],
    settings: EngineSettings | None = None,
    *,
    gate: AccuracyGate | None = None,
    report: Mapping[str, Any] | None = None,
) -> EngineExport:
    """Build `path` and the record beside it, after the engine has shown the embeddings of the reference on `faces`.

    Args:
        proto: the graph in its precision, with its metadata, as `export.to_onnx.make_onnx` gives it.
        path: the engine; replaced atomically.
        reference: the checkpoint in fp32, or the ONNX file that the engine is made of.
        faces: (N, S, S, 3) uint8 RGB, N >= `NUM_PARITY_FACES`.
        settings: profiles and so on.
        gate: rates that may not fall; int8 needs it.
        report: further entries of the record beside the engine.

    Raises:
        ExportError: no GPU or TensorRT, TensorRT refuses the graph, or a gate fails. No file is left then.
    """
    settings = settings or EngineSettings()
    metadata = ModelMetadata.from_props({entry.key: entry.value for entry in proto.metadata_props}, name="The graph")
    _check(metadata, settings, gate)
    gpu = require_tensorrt()
    started = time.perf_counter()
    plan = build_plan(proto.SerializeToString(deterministic=True), metadata, settings)
    record = _describe(plan, metadata, settings, gpu, time.perf_counter() - started)
    with atomic_path(path) as temporary:
        temporary.write_bytes(plan)
        engine = TensorRtEmbedder(plan, record, name=str(path))
        parity = check_parity(reference, engine, faces)
        accuracy = None if gate is None else check_accuracy(reference, engine, gate)
        # Should the process die between the two, the record names another SHA-256 and the old engine is refused.
        gates = {"parity": parity.to_json(), "accuracy": None if accuracy is None else accuracy.to_json()}
        write_json(record_path(path), {**(report or {}), **gates, "engine": record.model_dump(mode="json")})
    return EngineExport(record, parity, accuracy)


def opset_for(tensorrt_release: str, precision: Precision) -> int:
    """The newest opset that a TensorRT release, such as `10.13`, surely reads.

    With bf16 older releases get 22, the first with bf16 convolutions: their parser goes by the names of operators and
    refuses no opset as too new.
    """
    release = tuple(int(part) for part in tensorrt_release.split(".")[:2])
    for first, opset in _NEWEST_OPSETS:
        if release >= first:
            return opset
    return MIN_BF16_OPSET_VERSION if precision == "bf16" else MIN_OPSET_VERSION


def build_plan(serialized_onnx: bytes, metadata: ModelMetadata, settings: EngineSettings) -> bytes:
    """The serialised engine, built for the GPU of the local rank: the one that would run it.

    Raises:
        ExportError: TensorRT cannot read the graph, or builds nothing of it.
    """
    trt = importlib.import_module("tensorrt")
    with new_stream():  # a builder belongs to the GPU that is current when it is made, and times kernels there
        return _build(trt, serialized_onnx, metadata, settings)


def _build(trt: Any, serialized_onnx: bytes, metadata: ModelMetadata, settings: EngineSettings) -> bytes:
    logger, messages = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(serialized_onnx):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ExportError(
            f"TensorRT {trt.__version__} cannot read the graph: {'; '.join(errors) or 'no reason given'}. Export with "
            "a lower --opset (20, or 22 for bf16), or update TensorRT."
        )
    config = _configure(trt, builder, metadata, settings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"TensorRT {trt.__version__} built no engine: {'; '.join(messages[-3:]) or 'no reason given'}. If memory "
            "is short, lower --workspace-gib or the largest batch of --batch-profile; bf16 needs compute capability "
            "8.0 or higher."
        )
    if settings.timing_cache is not None:
        with atomic_path(settings.timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _configure(trt: Any, builder: Any, metadata: ModelMetadata, settings: EngineSettings) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings.workspace_gib * _GIB))
    if settings.optimisation_level is not None:
        config.builder_optimization_level = settings.optimisation_level
    side = metadata.image_size
    shape = (side, side, 3) if metadata.input_layout == "uint8_nhwc" else (3, side, side)
    for batch in settings.profiles:
        profile = builder.create_optimization_profile()
        sizes = ((size, *shape) for size in (batch.minimum, batch.optimum, batch.maximum))
        profile.set_shape(metadata.input_name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT refuses --batch-profile {batch}; try a smaller largest batch.")
    if settings.timing_cache is not None:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            raise ExportError(
                f"--timing-cache {settings.timing_cache} is of another GPU or another TensorRT, or damaged; name "
                "another file or delete this one."
            )
    return config


def _check(metadata: ModelMetadata, settings: EngineSettings, gate: AccuracyGate | None) -> None:
    if metadata.precision == "int8" and metadata.quantisation != "tensorrt":
        raise ExportError(
            "TensorRT takes int8 with symmetric scales in front of each layer, and this file has the scales of a CPU; "
            "export it with --precision int8 --int8-for tensorrt."
        )
    if metadata.precision == "int8" and gate is None:
        raise ExportError(
            "int8 changes every embedding, so it needs a set to show what that costs: name faces of at least two "
            "images per identity with --accuracy-set."
        )
    level = settings.optimisation_level
    if level is not None and level not in _OPTIMISATION_LEVELS:
        raise ExportError(f"--optimisation-level {level} does not exist; 0 (fast build) to 5 (fast engine) do.")
    if settings.workspace_gib is not None and not settings.workspace_gib > 0:
        raise ExportError(f"--workspace-gib {settings.workspace_gib:g} is no memory; give a number above 0.")


def _describe(
    plan: bytes, metadata: ModelMetadata, settings: EngineSettings, gpu: GpuState, build_s: float
) -> EngineRecord:
    return EngineRecord(
        engine_format_version=ENGINE_FORMAT_VERSION,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        model=metadata,
        profiles=settings.profiles,
        tensorrt_version=gpu.tensorrt_version,
        device=gpu.device,
        compute_capability=gpu.compute_capability,
        cuda_version=gpu.cuda_version,
        build_s=round(build_s, 1),
        timing_cache=None if settings.timing_cache is None else str(settings.timing_cache),
        optimisation_level=settings.optimisation_level,
    )
