"""What stands beside an engine: its contract, and where and how it was built.

The engine itself stays a plain plan, so that other tools can load it; `FILE.json` names its SHA-256, and one without
the other is refused.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aroface.errors import ExportError
from aroface.files import read_json, sha256_of
from export.metadata import ModelMetadata

__all__ = ["BatchProfile", "EngineRecord", "read_engine_record", "record_path"]

ENGINE_FORMAT_VERSION = 1
_MAX_BATCH = 4096


class BatchProfile(BaseModel):
    """A range of batch sizes, and the size that its kernels are chosen for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: int = Field(ge=1, le=_MAX_BATCH)
    optimum: int = Field(ge=1, le=_MAX_BATCH)
    maximum: int = Field(ge=1, le=_MAX_BATCH)

    @model_validator(mode="after")
    def _is_ordered(self) -> "BatchProfile":
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError("a batch profile is MIN <= OPT <= MAX")
        return self

    @classmethod
    def parse(cls, text: str) -> "BatchProfile":
        """`1,32,64` as a profile.

        Raises:
            ExportError: not three whole numbers in order.
        """
        parts = text.split(",")
        try:
            minimum, optimum, maximum = (int(part) for part in parts)
            return cls(minimum=minimum, optimum=optimum, maximum=maximum)
        except ValueError as error:  # pydantic's errors are ValueErrors as well
            raise ExportError(
                f"--batch-profile {text!r} is not MIN,OPT,MAX: three whole numbers from 1 to {_MAX_BATCH} in ascending "
                "order, such as 1,32,64."
            ) from error

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimum},{self.maximum}"


class EngineRecord(BaseModel):
    """The entries of `FILE.json` that running the engine needs; the export report holds more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    engine_format_version: int
    engine_sha256: str
    model: ModelMetadata
    profiles: tuple[BatchProfile, ...] = Field(min_length=1)
    tensorrt_version: str
    device: str
    compute_capability: str
    cuda_version: str
    build_s: float
    timing_cache: str | None = Field(description="file that was read and written")
    optimisation_level: int | None

    @property
    def tensorrt_release(self) -> str:
        """Major and minor version."""
        return ".".join(self.tensorrt_version.split(".")[:2])


def record_path(engine: Path) -> Path:
    """Where the record of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def read_engine_record(engine: Path) -> EngineRecord:
    """The record of an engine, after checking that the two belong together.

    Raises:
        ExportError: one of the two is missing or damaged, or they are of two builds.
    """
    if not engine.is_file():
        raise ExportError(
            f"{engine} does not exist; make it with `aroface export CHECKPOINT --to tensorrt --out {engine}`."
        )
    path = record_path(engine)
    if not path.is_file():
        raise ExportError(
            f"{path} is missing: it says how faces become the input of {engine.name}. Copy it along with the engine, "
            "or build the engine again with `aroface export`."
        )
    entries = read_json(path).get("engine")
    if not isinstance(entries, dict) or entries.get("engine_format_version") != ENGINE_FORMAT_VERSION:
        raise ExportError(
            f"{path} describes no engine of format {ENGINE_FORMAT_VERSION}; build it again with `aroface export`."
        )
    try:
        record = EngineRecord.model_validate(entries)
    except ValidationError as error:
        raise ExportError(f"{path} is damaged: {error}. Build the engine again with `aroface export`.") from error
    if sha256_of(engine) != record.engine_sha256:
        raise ExportError(
            f"{engine} is not the engine that {path.name} describes (SHA-256 differs): it is damaged, or one of the "
            "two was replaced. Copy both again, or build the engine again."
        )
    return record
