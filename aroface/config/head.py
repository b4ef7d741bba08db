"""Settings of the heads."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aroface.config.section import Section

__all__ = [
    "AdaFaceConfig",
    "ArcFaceConfig",
    "CombinedMarginConfig",
    "CosFaceConfig",
    "CurricularFaceConfig",
    "HeadConfig",
    "MagFaceConfig",
    "SoftmaxHeadConfig",
]

Continuation = Literal["reflect", "linear", "plain", "easy"]


class SoftmaxHeadConfig(Section):
    """What all heads have in common."""

    # Up to 200, so that exp(s cos - s) of the farthest class still is a float64 number when ranks add theirs.
    logit_scale: float = Field(64.0, gt=0, le=200, description="s: factor on the cosines before the softmax")
    margin_gradient: Literal["exact", "straight_through"] = Field(
        "exact", description="differentiate the margin, or take d target / d cos = 1 as arcface_torch does"
    )
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the classes in each step's softmax (Partial FC)")
    implementation: Literal["auto", "plain", "chunked", "triton"] = Field(
        "auto",
        description="plain: all logits at once, by autograd, in fp32; chunked; triton: fused GPU kernels that write no "
        "logits, not with changed negatives; auto: chunked. The same result within rounding",
    )
    chunk_classes: int | None = Field(
        None,
        ge=1,
        description="classes whose logits exist at one time: memory, not the result; null: on a GPU 2^24 / images, at "
        "least 8192; on a CPU 1024 where there are more than 8192 classes, else all at once",
    )
    logit_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the factors in the matrix products with the class centres; sums are fp32 in both cases"
    )

    @model_validator(mode="after")
    def _plain_is_fp32(self) -> Self:
        if self.implementation == "plain" and self.logit_precision != "fp32":
            raise ValueError(
                "implementation = plain computes in fp32; set logit_precision: fp32 or another implementation"
            )
        return self


class _FilteredHead(SoftmaxHeadConfig):
    interclass_filter: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="negatives with a larger cosine count as wrong labels: their logit becomes 0; null: off",
    )


class ArcFaceConfig(_FilteredHead):
    """Additive angular margin, arXiv:1801.07698."""

    kind: Literal["arcface"]
    margin: float = Field(ge=0, le=1.57, description="m, radians")
    continuation: Continuation = Field(
        "reflect", description="target logit where cos(theta + m) would rise again; docs/heads.md has the formulas"
    )


class CosFaceConfig(_FilteredHead):
    """Additive cosine margin, arXiv:1801.09414. `margin_gradient` is without effect: the derivative is 1 anyway."""

    kind: Literal["cosface"]
    margin: float = Field(ge=0, le=1, description="m, taken off the cosine")


class CombinedMarginConfig(_FilteredHead):
    """cos(m1 theta + m2) - m3, arXiv:1801.07698."""

    kind: Literal["combined"]
    m1: float = Field(1.0, ge=1, le=4, description="factor on the angle (SphereFace)")
    m2: float = Field(0.0, ge=0, le=1.57, description="added to the angle, radians (ArcFace)")
    m3: float = Field(0.0, ge=0, le=1, description="taken off the cosine (CosFace)")
    continuation: Literal["reflect", "plain"] = Field(
        "reflect", description="target logit where cos(m1 theta + m2) would rise again"
    )


class AdaFaceConfig(_FilteredHead):
    """Margin adapted to the feature norm, arXiv:2204.00964."""

    kind: Literal["adaface"]
    margin: float = Field(ge=0, le=1.57, description="m, the base margin")
    h: float = Field(0.333, gt=0, le=1, description="concentration: norms within mean +- std/h map to [-1, 1]")
    statistics_momentum: float = Field(
        0.01, gt=0, le=1, description="weight of a new batch in the running mean and std of the norms (t_alpha)"
    )


class CurricularFaceConfig(SoftmaxHeadConfig):
    """ArcFace whose hard negatives weigh more as training goes on, arXiv:2004.00288."""

    kind: Literal["curricularface"]
    margin: float = Field(0.5, ge=0, le=1.57, description="m, radians")
    continuation: Continuation = Field("linear", description="target logit where cos(theta + m) would rise again")
    statistics_momentum: float = Field(
        0.01, gt=0, le=1, description="weight of a new batch in t, the running mean of the target cosines"
    )


class MagFaceConfig(_FilteredHead):
    """Angular margin that grows with the feature norm, and a reward for large norms, arXiv:2103.06627."""

    kind: Literal["magface"]
    margin_gradient: Literal["exact"] = Field(
        "exact", description="only exact: without the margin's derivative every norm would grow to upper_norm"
    )
    lower_norm: float = Field(10.0, gt=0, description="l_a: norms below count as this")
    upper_norm: float = Field(110.0, gt=0, description="u_a: norms above count as this")
    lower_margin: float = Field(0.45, ge=0, le=1.57, description="margin at lower_norm, radians")
    upper_margin: float = Field(0.8, ge=0, le=1.57, description="margin at upper_norm, radians")
    regulariser_weight: float = Field(35.0, ge=0, description="lambda_g, factor of g(a) = 1/a + a/upper_norm^2")
    continuation: Continuation = Field("easy", description="target logit where cos(theta + m) would rise again")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for low, high in (("lower_norm", "upper_norm"), ("lower_margin", "upper_margin")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} = {getattr(self, low)} is not below {high} = {getattr(self, high)}; MagFace uses norms "
                    "10 to 110 and margins 0.45 to 0.8"
                )
        return self


HeadConfig = Annotated[
    ArcFaceConfig | CosFaceConfig | CombinedMarginConfig | AdaFaceConfig | CurricularFaceConfig | MagFaceConfig,
    Field(discriminator="kind"),
]
