"""Settings of the heads."""

from typing import Annotated, Literal

from pydantic import Field

from aroface.config.section import Section

__all__ = [
    "AdaFaceConfig",
    "ArcFaceConfig",
    "HeadConfig",
]


class _SoftmaxHead(Section):
    logit_scale: float = Field(64.0, gt=0, description="s: factor on the cosines before the softmax")
    margin: float = Field(description="m, radians (ArcFace) or the base margin (AdaFace)", ge=0, le=1.57)
    margin_gradient: Literal["exact", "straight_through"] = Field(
        "exact", description="differentiate the margin, or take d target / d cos = 1 as arcface_torch does"
    )
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the classes in each step's softmax (Partial FC)")
    chunk_classes: int = Field(8192, ge=1, description="classes whose logits exist at one time; memory, not the result")


class ArcFaceConfig(_SoftmaxHead):
    """Additive angular margin, arXiv:1801.07698."""

    kind: Literal["arcface"]


class AdaFaceConfig(_SoftmaxHead):
    """Margin adapted to the feature norm, arXiv:2204.00964."""

    kind: Literal["adaface"]
    h: float = Field(0.333, gt=0, le=1, description="concentration: norms within mean +- std/h map to [-1, 1]")
    statistics_momentum: float = Field(
        0.01, gt=0, le=1, description="weight of a new batch in the running mean and std of the norms (t_alpha)"
    )


HeadConfig = Annotated[ArcFaceConfig | AdaFaceConfig, Field(discriminator="kind")]
