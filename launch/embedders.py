"""A model path of any kind -> the embedder that runs it."""

from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import ConfigError, ExportError
from aroface.types import Embedder

if TYPE_CHECKING:
    from aroface.inference import InferencePrecision

__all__ = ["open_embedder"]


def open_embedder(
    path: Path, *, precision: "InferencePrecision" = "fp32", threads: int | None = None, batch_size: int = 64
) -> Embedder:
    """PyTorch for a run directory or checkpoint, ONNX Runtime for an .onnx file.

    Args:
        path: the model.
        precision: arithmetic of PyTorch; an ONNX file has its own and takes only `fp32` here, meaning as exported.
        threads: CPU threads; None leaves it to the runtime. For PyTorch this is a setting of the whole process.
        batch_size: largest batch that goes through the network at once.

    Raises:
        ConfigError: `precision` does not fit the kind of model.
        CheckpointError, ExportError: there is no such model, or it is damaged.
    """
    if path.suffix == ".onnx":
        if precision != "fp32":
            raise ConfigError(
                f"--precision {precision} is for checkpoints; {path} computes in the precision it was exported with."
            )
        from export.runtime import OnnxEmbedder

        return OnnxEmbedder(path, threads=threads, batch_size=batch_size)
    if path.is_file() and path.suffix != ".safetensors" and path.name != "best.json":
        raise ExportError(
            f"{path} is not a model that can be run: name a run directory, one of its step-NNNNNNNN directories, its "
            "best.json, a model.safetensors, or a file whose name ends in .onnx."
        )
    import torch

    from aroface.inference import load_embedder

    if threads is not None:
        torch.set_num_threads(threads)
    return load_embedder(path, precision=precision, batch_size=batch_size)
