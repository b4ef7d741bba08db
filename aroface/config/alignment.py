"""Settings of the alignment attack."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from aroface.config.section import Section
from aroface.contract import ARCFACE_TEMPLATE_112

__all__ = [
    "STEPS_TO_SETTLE",
    "AlignmentConfig",
    "AlignmentKind",
    "ElasticConfig",
    "release_counts",
]

AlignmentKind = Literal["none", "random", "adversarial", "delayed", "best_of", "elastic"]

#: Optimiser steps after which running averages are those of the network, and not of what it began with: with PyTorch's
#: momentum of 0.1, 0.9^100 = 3e-5 of the beginning is left, and a deep network has left the chaos of its first dozen.
STEPS_TO_SETTLE = 100

#: Farthest landmark of the template from the centre, in half images.
_FARTHEST_LANDMARK = max(math.hypot((2 * x + 1) / 112 - 1, (2 * y + 1) / 112 - 1) for x, y in ARCFACE_TEMPLATE_112)

#: A cubic B-spline lattice cannot fold while no component moves farther than this part of its spacing (Choi and Lee,
#: "Injectivity conditions of 2D and 3D uniform cubic B-spline functions", 2000: 1 / 2.0464).
_FOLD_FREE = 0.4886


class ElasticConfig(Section):
    """The local field of kind `elastic`, in pixels of a 112-px face."""

    amplitude_px: float = Field(2.0, gt=0, le=20, description="no pixel moves farther than this along x or along y")
    spacing_px: float = Field(28.0, ge=4, le=112, description="distance of the lattice points: smoothness of the field")
    step_px: float = Field(1.5, gt=0, le=20, description="eta of each lattice point")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.amplitude_px > _FOLD_FREE * self.spacing_px:
            raise ValueError(
                f"amplitude_px = {self.amplitude_px} can fold a face whose lattice has spacing_px = {self.spacing_px}; "
                f"lower amplitude_px to at most {_FOLD_FREE * self.spacing_px:.2f}, or widen spacing_px"
            )
        if self.step_px > self.amplitude_px:
            raise ValueError(
                f"step_px = {self.step_px} leaves amplitude_px = {self.amplitude_px} with the first step; lower step_px"
            )
        return self


class AlignmentConfig(Section):
    """Which images are re-aligned in each step, how, and how far.

    One section for all kinds, so that `alignment.kind=none` or `=random` turns any run into its own control; settings
    that a kind does not use are still checked.
    """

    kind: AlignmentKind = Field(
        description="none; random: a random corner; adversarial: sign ascent; delayed: the direction comes from the "
        "main pass of the step before; best_of: the worst of `candidates` random corners; elastic: sign ascent on a "
        "local deformation as well"
    )
    share: float = Field(0.25, ge=0, le=1, description="p: share of each micro-batch that is warped")
    steps: int = Field(1, ge=1, le=50, description="k: sign-ascent steps, or random steps of kind random")
    candidates: int = Field(4, ge=1, le=16, description="n: corners that best_of tries, of the 16 there are")
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
    batch_statistics: Literal["auto", "batch", "running"] = Field(
        "auto",
        description="BatchNorm in the attack pass: of the attacked images, or the running averages; auto: running, "
        f"but batch in the first {STEPS_TO_SETTLE} steps, while the averages settle",
    )
    elastic: ElasticConfig = Field(ElasticConfig(), description="local field; ignored unless kind: elastic")
    consistency_weight: float = Field(
        0.0, ge=0, description="weight of 1 - cosine between a warped image and its clean version; 0: no such term"
    )
    release_compat: bool = Field(
        False, description="kind adversarial as the published code runs it, faults included (docs/alignment.md)"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.kind == "none":
            return self
        problems = [*self._share_problems(), *self._bound_problems(), *self._release_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _share_problems(self) -> list[str]:
        problems = []
        if self.share == 0:
            problems.append(f"share = 0 leaves nothing for kind = {self.kind}; set kind: none, or a share above 0")
        if self.kind == "delayed":
            if self.share > 0.5:
                problems.append(
                    f"share = {self.share} cannot be delayed: every warped image was clean in the step before, so at "
                    "most 0.5 can be warped; lower share, or use kind: adversarial"
                )
            if self.steps > 1:
                problems.append(
                    f"steps = {self.steps} cannot be delayed: the step before gave one gradient; set steps: 1, or use "
                    "kind: adversarial"
                )
            if self.batch_statistics == "running":
                problems.append(
                    "batch_statistics = running cannot be delayed: the gradient is that of the main pass, which "
                    "normalises by the batch; set batch_statistics: batch, or leave it out"
                )
        return problems

    def _release_problems(self) -> list[str]:
        if not self.release_compat:
            return []
        problems = []
        if self.kind != "adversarial":
            problems.append(f"release_compat = true has no kind: {self.kind}; set kind: adversarial")
        for name, is_default, default in (
            ("landmark_budget_px", self.landmark_budget_px is None, "null"),
            ("batch_statistics", self.batch_statistics != "running", "batch"),
            ("consistency_weight", self.consistency_weight == 0, "0"),
        ):
            if not is_default:
                problems.append(f"{name} is not in the published code; set {name}: {default}, or release_compat: false")
        return problems

    def _bound_problems(self) -> list[str]:
        problems = []
        for name, step, box in (
            ("scale", self.scale_step, self.scale_box),
            ("angle", self.angle_step_rad, self.angle_box_rad),
            ("shift", self.shift_step, self.shift_box),
        ):
            unit = "_rad" if name == "angle" else ""
            if step > box:
                problems.append(
                    f"{name}_step{unit} = {step} leaves {name}_box{unit} = {box} with the first step; lower the step "
                    f"to at most {box}, or widen the box"
                )
            if self.start_noise >= box:
                problems.append(
                    f"start_noise = {self.start_noise} starts outside of {name}_box{unit} = {box}; lower start_noise, "
                    "or widen the box"
                )
        if self.scale_step == self.angle_step_rad == self.shift_step == 0:
            problems.append(
                "scale_step, angle_step_rad and shift_step are all 0, so nothing but the start noise moves; set one "
                "above 0, or kind: none"
            )
        budget = self.landmark_budget_px
        if budget is not None and budget <= self.start_displacement_px:
            problems.append(
                f"landmark_budget_px = {budget} is used up by start_noise = {self.start_noise}, which moves the "
                f"farthest landmark by {self.start_displacement_px:.2f} px (RMS) before the first step; raise "
                "landmark_budget_px, or lower start_noise"
            )
        return problems

    def statistics_at(self, step: int) -> Literal["batch", "running"]:
        """What batch norm uses in the attack passes of an optimiser step."""
        if self.batch_statistics != "auto":
            return self.batch_statistics
        has_choice = self.kind != "delayed" and not self.release_compat
        return "running" if has_choice and step >= STEPS_TO_SETTLE else "batch"

    @property
    def start_displacement_px(self) -> float:
        """RMS distance that the start noise alone moves the farthest landmark, pixels of a 112-px face."""
        # At radius r: r ds outwards, r dphi across, and the two shifts.
        return 56 * self.start_noise * math.sqrt(2 * _FARTHEST_LANDMARK**2 + 2)


def release_counts(batch: int, share: float) -> tuple[int, int]:
    """Clean and warped images of a batch of the published code; their sum falls short of it where both round down."""
    ratio = 1 - share
    return int(batch * ratio), int(batch * (1 - ratio))
