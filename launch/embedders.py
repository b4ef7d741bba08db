"""A model path of any kind -> the embedder that runs it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aroface.errors import ConfigError, ExportError
from aroface.types import Embedder

if TYPE_CHECKING:
    from aroface.inference import InferencePrecision

__all__ = ["RuntimeName", "open_embedder"]

#: What runs an .onnx file.
RuntimeName = Literal["onnxruntime", "openvino"]


def open_embedder(
    path: Path,
    *,
    precision: "InferencePrecision" = "fp32",
    threads: int | None = None,
    batch_size: int = 64,
    runtime: RuntimeName = "onnxruntime",
) -> Embedder:
    """PyTorch for a run directory or checkpoint, ONNX Runtime or OpenVINO for .onnx, TensorRT for .engine.

    Args:
        path: the model.
        precision: arithmetic of PyTorch and of OpenVINO; elsewhere the model has its own, and only `fp32` is taken
            here, meaning as exported.
        threads: CPU threads; None leaves it to the runtime. For PyTorch this is a setting of the whole process.
        batch_size: largest batch that goes through the network at once.
        runtime: for an .onnx file.

    Raises:
        ConfigError: `precision` or `runtime` does not fit the kind of model.
        CheckpointError, ExportError: there is no such model, it is damaged, or this machine cannot run it.
    """
    is_onnx = path.suffix == ".onnx"
    if runtime != "onnxruntime" and not is_onnx:
        raise ConfigError(f"--runtime {runtime} runs .onnx files; {path} is none. Leave the option out.")
    if precision != "fp32" and (path.suffix == ".engine" or (is_onnx and runtime == "onnxruntime")):
        raise ConfigError(
            f"--precision {precision} is for checkpoints, and for .onnx files with --runtime openvino; {path} computes "
            "in the precision it was exported with."
        )
    if is_onnx and runtime == "openvino":
        from export.openvino_runtime import OpenVinoEmbedder

        return OpenVinoEmbedder(path, precision=precision, threads=threads, batch_size=batch_size)
    if is_onnx:
        from export.runtime import OnnxEmbedder

        return OnnxEmbedder(path, threads=threads, batch_size=batch_size)
    if path.suffix == ".engine":
        from export.tensorrt_runtime import open_engine

        return open_engine(path, batch_size=batch_size)
    if path.is_file() and path.suffix != ".safetensors" and path.name != "best.json":
        raise ExportError(
            f"{path} is not a model that can be run: name a run directory, one of its step-NNNNNNNN directories, its "
            "best.json, a model.safetensors, or a file whose name ends in .onnx or .engine."
        )
    import torch

    from aroface.inference import load_embedder

    if threads is not None:
        torch.set_num_threads(threads)
    return load_embedder(path, precision=precision, batch_size=batch_size)
