"""Settings of the evaluation while training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aroface.config.section import Section

__all__ = ["BestConfig", "EvaluateConfig", "EvaluationSet", "LfwLqSet", "VerificationSet"]


class VerificationSet(Section):
    """Pairs of faces: an InsightFace .bin, or faces with a list of pairs."""

    kind: Literal["verification"] = "verification"
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="what the metrics log calls it")
    faces: str = Field(description="folder, .zip or shards of aligned faces, or a .bin of InsightFace")
    pairs: str | None = Field(None, description="list in LFW's format; null: drawn from the set. A .bin has its own")
    max_missing_pairs: int = Field(0, ge=0, description="listed pairs that the set lacks and that may be left out")
    flip: Literal["sum", "none"] = Field("sum", description="mirror images added")


class LfwLqSet(Section):
    """Identification of small, compressed, misaligned probes among clean faces."""

    kind: Literal["lfw_lq"] = "lfw_lq"
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="what the metrics log calls it")
    faces: str = Field(description="folder, .zip or shards of aligned faces")
    sizes_px: list[Annotated[int, Field(ge=1, le=112)]] = Field(
        default=[28, 14], min_length=1, description="sides of the degraded faces, pixels"
    )
    severity: float = Field(0.5, ge=0, le=1, description="of the alignment error")
    flip: Literal["sum", "none"] = Field("sum", description="mirror images added")


EvaluationSet = Annotated[VerificationSet | LfwLqSet, Field(discriminator="kind")]


class BestConfig(Section):
    """Which number decides what the best checkpoint is; a number that was selected on says nothing about new data."""

    set: str = Field(description="name of one of evaluate.sets")
    metric: str = Field(description="key as it stands in metrics.jsonl, such as rank_1@28px; higher is better")


class EvaluateConfig(Section):
    """Evaluation every few steps and at the end, spread over the ranks; it leaves no trace in the training."""

    every_steps: int = Field(ge=1, description="steps between evaluations")
    sets: list[EvaluationSet] = Field(min_length=1)
    best: BestConfig | None = Field(None, description="keep the best checkpoint by this number; null: keep none")
    batch_size: int = Field(64, ge=1, description="images per forward pass and rank")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [one.name for one in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluate.sets has {twice[0]} twice; give every set a name of its own")
        if self.best is not None and self.best.set not in names:
            raise ValueError(f"evaluate.best.set = {self.best.set} is none of the sets; choose from {', '.join(names)}")
        return self
