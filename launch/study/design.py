"""What a study trains: every head x alignment x budget x seed, from one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, model_validator

from aroface.config import TrainConfig, apply_overrides, load_config, parse_config
from aroface.config.alignment import AlignmentConfig
from aroface.config.head import HeadConfig
from aroface.config.load import read_yaml
from aroface.config.section import Section
from aroface.errors import ConfigError
from launch.plan.passes import extra_passes

__all__ = ["Arm", "Budget", "Study", "StudyConfig", "StudyRun", "load_study"]

#: epochs: every arm sees each image equally often. passes: every arm does the same number of passes through the
#: backbone, so that an arm whose attack costs passes trains for fewer epochs.
Budget = Literal["epochs", "passes"]

#: Passes of a plain step, in units of one forward pass: forward, and twice that backward.
_PLAIN_PASSES = 3.0


class StudyConfig(Section):
    """One study, complete but for the training recipe that it names."""

    title: str = Field("Alignment attacks compared", min_length=1, description="heading of the page of results")
    base: str = Field(description="training configuration, relative to this file; its head and alignment are replaced")
    base_on_gpu: str | None = Field(None, description="the same for a machine with a CUDA device; null: base")
    seeds: list[int] = Field(min_length=1, description="each arm is trained once with each")
    heads: dict[str, HeadConfig] = Field(min_length=1)
    alignments: dict[str, AlignmentConfig] = Field(min_length=1)
    budgets: list[Budget] = Field(["epochs", "passes"], min_length=1)
    references: list[str] = Field(min_length=1, description="alignments that the others are compared with, by seed")
    sizes_px: list[int] = Field([40, 28, 20, 14], min_length=1, description="sides of the low-quality probes")
    fae_probes: int = Field(500, ge=1, description="probes of the misalignment sweep")

    @model_validator(mode="after")
    def _names_exist(self) -> "StudyConfig":
        unknown = [name for name in self.references if name not in self.alignments]
        if unknown:
            raise ValueError(f"references names {unknown}, which are not among {list(self.alignments)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} repeats one; every seed is one independent training")
        return self


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    head: str
    alignment: str
    budget: Budget

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.head}-{self.alignment}-{self.budget}"


@dataclass(frozen=True)
class StudyRun:
    """One training of one arm."""

    arm: Arm
    seed: int
    overrides: tuple[str, ...]  #: of the base configuration
    epochs: float

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm.name}-seed{self.seed}"


class Study:
    """A study file with its recipe.

    Args:
        config: the study.
        base: path of the training configuration.
    """

    def __init__(self, config: StudyConfig, base: Path) -> None:
        self.config, self.base = config, base
        self._recipe = read_yaml(base.read_text(encoding="utf-8"), name=str(base))
        self.schedule = load_config(base, TrainConfig).schedule

    def arms(self) -> list[Arm]:
        """Every arm that is trained. Where an attack costs no passes, both budgets are one arm, named `epochs`."""
        return [
            Arm(head, name, budget)
            for budget, head, name in product(self.config.budgets, self.config.heads, self.config.alignments)
            if budget == "epochs" or "epochs" not in self.config.budgets or self._extra(name)
        ]

    def arm_of(self, head: str, alignment: str, budget: Budget) -> Arm:
        """The trained arm that stands for an alignment under a budget."""
        arm = Arm(head, alignment, budget)
        return arm if arm in self.arms() else Arm(head, alignment, "epochs")

    def runs(self) -> Iterator[StudyRun]:
        """All trainings, seed by seed, so that a study that is cut short has whole comparisons.

        Raises:
            ConfigError: an arm whose settings the trainer refuses.
        """
        for seed, arm in product(self.config.seeds, self.arms()):
            share = 1.0
            if arm.budget == "passes":
                share = _PLAIN_PASSES / (_PLAIN_PASSES + self._extra(arm.alignment))
            epochs = round(self.schedule.epochs * share, 4)
            settings: dict[str, Any] = {
                "seed": seed,
                "head": self.config.heads[arm.head].model_dump(),
                "alignment": self.config.alignments[arm.alignment].model_dump(),
                "schedule.epochs": epochs,
                "schedule.warmup_epochs": round(self.schedule.warmup_epochs * share, 4),
            }
            overrides = tuple(f"{key}={_as_yaml(value)}" for key, value in settings.items())
            parse_config(apply_overrides(self._recipe, overrides), TrainConfig, name=f"{self.base} with {arm.name}")
            yield StudyRun(arm, seed, overrides, epochs)

    def _extra(self, alignment: str) -> float:
        return extra_passes(self.config.alignments[alignment]).total


def load_study(path: Path, *, has_gpu: bool | None = None) -> Study:
    """Read a study file and the recipe beside it.

    Args:
        path: of the study.
        has_gpu: whether to take `base_on_gpu`; None: where there is a CUDA device.

    Raises:
        ConfigError: settings that are wrong or unknown, or a recipe that is not there.
    """
    config = load_config(path, StudyConfig)
    key, name = "base", config.base
    if config.base_on_gpu is not None and (torch.cuda.is_available() if has_gpu is None else has_gpu):
        key, name = "base_on_gpu", config.base_on_gpu
    base = path.parent / name
    if not base.is_file():
        raise ConfigError(f"{path}: {key} = {name} is not a file beside it; name the training configuration.")
    return Study(config, base)


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("...").strip()
