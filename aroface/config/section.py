"""What every section of a configuration has in common."""

from pydantic import BaseModel, ConfigDict

__all__ = [
    "Section",
]


class Section(BaseModel):
    """Frozen; unknown keys, other types and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
