"""What an exported model says about itself: the input contract and where it comes from, as ONNX metadata."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aroface.contract import ColourOrder, InputContract
from aroface.errors import ExportError

__all__ = ["FORMAT_VERSION", "InputLayout", "ModelMetadata", "Precision", "QuantisationTarget"]

FORMAT_VERSION = 1
_PREFIX = "aroface."

#: uint8_nhwc: (N, S, S, 3) RGB pixels, preprocessing in the graph. float_nchw: (N, 3, S, S) preprocessed by the caller.
InputLayout = Literal["uint8_nhwc", "float_nchw"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
#: The runtime that the scales of an int8 graph are placed for: see `export.quantise`.
QuantisationTarget = Literal["cpu", "tensorrt"]


class ModelMetadata(BaseModel):
    """The entries of `metadata_props`, each under `aroface.NAME`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int
    aroface_version: str
    model_id: str
    checkpoint_sha256: str = Field(description="of backbone.safetensors")
    input_name: str = "images"
    input_layout: InputLayout
    image_size: int
    colour_order: ColourOrder = Field(description="of the network; uint8 input is RGB whatever this says")
    mean: float
    std: float
    template: str
    output_embedding: str = "embedding"
    output_norm: str = "norm"
    embedding_dim: int
    flip_fusion: bool = Field(description="the embedding is the sum over the image and its mirror image")
    precision: Precision = Field(description="of the body of the network; the neck computes in fp32")
    quantisation: QuantisationTarget | None = Field(default=None, description="where the scales of int8 stand")
    scales_sha256: str | None = Field(default=None, description="of the calibrated scales of int8")

    @property
    def contract(self) -> InputContract:
        """The input contract of the network."""
        return InputContract.model_validate(self.model_dump(include=set(InputContract.model_fields)))

    def to_props(self) -> dict[str, str]:
        """Entries for `metadata_props`, all text."""
        values = self.model_dump(mode="json")
        return {
            f"{_PREFIX}{key}": str(value).lower() if isinstance(value, bool) else str(value)
            for key, value in values.items()
            if value is not None
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str], *, name: str) -> "ModelMetadata":
        """Read the entries back; `name` is what the error calls the model.

        Raises:
            ExportError: the model was not exported by aroface, or by a newer one, or lacks an entry.
        """
        values = {key.removeprefix(_PREFIX): value for key, value in props.items() if key.startswith(_PREFIX)}
        missing = [key for key, field in cls.model_fields.items() if field.is_required() and key not in values]
        if missing:
            raise ExportError(
                f"{name} carries no complete input contract; its metadata lacks "
                f"{', '.join(_PREFIX + key for key in missing)}. Without it the preprocessing would be a guess: "
                "export the checkpoint with `aroface export CHECKPOINT --to onnx --out FILE`."
            )
        if values["format_version"] != str(FORMAT_VERSION):
            raise ExportError(
                f"{name} has metadata format {values['format_version']}; this aroface reads {FORMAT_VERSION}. "
                "Export the checkpoint again with this version."
            )
        try:
            metadata = cls.model_validate(values)
            _ = metadata.contract
        except ValidationError as error:
            raise ExportError(f"{name} has damaged metadata: {error}") from error
        return metadata
