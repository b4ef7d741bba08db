"""Reading an exported ONNX file without running it."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from aroface.errors import ExportError
from export.metadata import ModelMetadata

__all__ = ["read_onnx", "require_file"]


def read_onnx(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """The graph and what it says about itself.

    Raises:
        ExportError: the file is missing, is not ONNX, or carries no contract.
    """
    require_file(path)
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ExportError(f"{path} is not an ONNX file, or damaged: {error}. Export the checkpoint again.") from error
    props = {entry.key: entry.value for entry in proto.metadata_props}
    return proto, ModelMetadata.from_props(props, name=str(path))


def require_file(path: Path) -> None:
    """Refuse a model that is not there.

    Raises:
        ExportError: no such file.
    """
    if not path.is_file():
        raise ExportError(f"{path} does not exist; make it with `aroface export CHECKPOINT --to onnx --out {path}`.")
