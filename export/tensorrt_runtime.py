"""A TensorRT engine as an embedder, on the GPU it was built for."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aroface.devices import own_gpu
from aroface.errors import ExportError
from export.embedder import ExportedEmbedder
from export.engine_record import BatchProfile, EngineRecord, read_engine_record
from export.tensorrt_probe import require_tensorrt

__all__ = ["TensorRtEmbedder", "choose_profile", "make_logger", "new_stream", "open_engine"]


class TensorRtEmbedder(ExportedEmbedder):
    """`aroface.types.Embedder` on TensorRT, on the GPU of the local rank, or the first.

    Args:
        plan: the serialised engine.
        record: what stands beside it.
        name: what error messages call the engine.
        batch_size: largest batch that goes through the network at once; the largest profile bounds it too.

    Raises:
        ExportError: TensorRT cannot load the plan.
    """

    def __init__(self, plan: bytes, record: EngineRecord, *, name: str, batch_size: int = 64) -> None:
        trt = importlib.import_module("tensorrt")
        logger, messages = make_logger(trt)
        self._stream = new_stream()
        with self._stream:  # an engine belongs to the GPU that is current when it is loaded
            self._runtime_of_engine = trt.Runtime(logger)  # must outlive the engine
            self._engine = self._runtime_of_engine.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ExportError(
                f"TensorRT {trt.__version__} cannot load {name}: {'; '.join(messages[-3:]) or 'no reason given'}. "
                f"It was built with {record.tensorrt_version} for {record.device}; build it again on this machine."
            )
        self._name = name
        self._profiles = record.profiles
        self._contexts: dict[int, Any] = {}
        largest = max(profile.maximum for profile in record.profiles)
        super().__init__(self._run, record.model, runtime="tensorrt", batch_size=min(batch_size, largest))

    def _run(self, batch: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        index = choose_profile(self._profiles, len(batch))
        wanted = len(batch)
        missing = self._profiles[index].minimum - wanted
        if missing > 0:
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        device = self._stream.device
        with self._stream:
            context = self._context(index)
            source = torch.from_numpy(batch).to(device)
            embeddings = torch.empty(len(batch), self.embedding_dim, device=device)
            norms = torch.empty(len(batch), device=device)
            tensors = {
                self.metadata.input_name: source,
                self.metadata.output_embedding: embeddings,
                self.metadata.output_norm: norms,
            }
            is_ready = context.set_input_shape(self.metadata.input_name, tuple(batch.shape)) and all(
                context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in tensors.items()
            )
            if not (is_ready and context.execute_async_v3(self._stream.handle)):
                raise ExportError(
                    f"{self._name} does not run a batch of {len(batch)}: its profiles are "
                    f"{' and '.join(map(str, self._profiles))} (smallest, best, largest batch). Build it again."
                )
            self._stream.synchronize()
        return embeddings.cpu().numpy()[:wanted], norms.cpu().numpy()[:wanted]

    def _context(self, index: int) -> Any:
        """One context per profile: switching a context between profiles costs more than the second one's memory."""
        if index not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, self._stream.handle):
                raise ExportError(
                    f"{self._name} cannot be run with batches of {self._profiles[index]}: too little memory on the "
                    "GPU? Free some, or build it with a smaller largest batch."
                )
            self._stream.synchronize()
            self._contexts[index] = context
        return self._contexts[index]


def open_engine(path: Path, *, batch_size: int = 64) -> TensorRtEmbedder:
    """The engine in `path`.

    Raises:
        ExportError: it or its record is missing or damaged, it is of another TensorRT or GPU, or there is no GPU.
    """
    record = read_engine_record(path)
    gpu = require_tensorrt()
    here = (gpu.tensorrt_release, gpu.compute_capability)
    if here != (record.tensorrt_release, record.compute_capability):
        raise ExportError(
            f"{path} was built with TensorRT {record.tensorrt_version} for {record.device} (compute capability "
            f"{record.compute_capability}); here are TensorRT {gpu.tensorrt_version} and {gpu.device} "
            f"({gpu.compute_capability}). Build it again here: `aroface export MODEL.onnx --to tensorrt --out {path}`."
        )
    return TensorRtEmbedder(path.read_bytes(), record, name=str(path), batch_size=batch_size)


def choose_profile(profiles: tuple[BatchProfile, ...], batch: int) -> int:
    """Index of the profile whose best batch is nearest among those that take `batch`, padded where it is too small."""
    fitting = [index for index, profile in enumerate(profiles) if batch <= profile.maximum]
    return min(fitting, key=lambda index: (profiles[index].minimum > batch, abs(profiles[index].optimum - batch)))


def make_logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger for TensorRT, and the list that it appends errors to."""
    messages: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                messages.append(message)

    return Collector(), messages


class _CudaStream:
    """A stream of its own as a context manager: on the default one TensorRT synchronises more than it must.

    Inside, its GPU is the current one, whatever thread enters.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", own_gpu() or 0)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._guard: Any = None

    @property
    def handle(self) -> int:
        return int(self._stream.cuda_stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def __enter__(self) -> "_CudaStream":
        self._guard = torch.cuda.stream(self._stream)
        self._guard.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)


def new_stream() -> _CudaStream:
    """A stream on the GPU of the local rank; inside it that GPU is the current one."""
    return _CudaStream()
