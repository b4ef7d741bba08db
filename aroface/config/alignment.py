"""Settings of the alignment attack."""

from typing import Literal

from pydantic import Field

from aroface.config.section import Section

__all__ = [
    "AlignmentConfig",
]


class AlignmentConfig(Section):
    """Which images are re-aligned in each step, how, and how far."""

    kind: Literal["none", "random", "adversarial"]
    share: float = Field(0.25, ge=0, le=1, description="p: share of each micro-batch that is warped")
    steps: int = Field(1, ge=1, le=50, description="k: sign-ascent steps; ignored unless adversarial")
    start_noise: float = Field(
        0.01, ge=0, description="standard deviation of the start around the identity, all parameters"
    )
    scale_step: float = Field(0.1, ge=0, le=1, description="eta of the warp scale")
    angle_step_rad: float = Field(0.1, ge=0, le=1, description="eta of the angle, radians")
    shift_step: float = Field(0.1, ge=0, le=1, description="eta of the shift, half images")
    scale_box: float = Field(0.2, gt=0, lt=1, description="the warp scale stays within 1 +- this")
    angle_box_rad: float = Field(0.2, gt=0, le=3.15, description="the angle stays within +- this, radians")
    shift_box: float = Field(0.2, gt=0, le=1, description="each shift stays within +- this, half images")
    landmark_budget_px: float | None = Field(
        None,
        gt=0,
        description="farthest any of the five template landmarks may move, pixels of a 112-px face; null: no limit",
    )
    batch_statistics: Literal["batch", "running"] = Field(
        "batch", description="BatchNorm in the attack pass: of the attacked images, or the running averages"
    )
