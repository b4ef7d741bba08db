"""Trainings of a tiny network on images drawn in memory: many of them in one process, on any number of ranks."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from aroface.config.load import apply_overrides, parse_config
from aroface.config.schema import TrainConfig
from aroface.distributed import barrier, rank
from aroface.engine.trainer import Resume, Trainer
from aroface.types import Batch, Evaluator
from shards.order import Random

CLASSES, SAMPLES, SIZE = 12, 72, 16
BATCH = 12  # divides by 1, 2 and 3 ranks

#: Nothing that is drawn per rank, and no statistics of the images of one rank: runs at other numbers of ranks compare.
COMPARABLE = ("engine.precision=fp32", "engine.batch_norm=frozen", "alignment={kind: none}", "data.augment={flip: 0}")
#: Small parameters are partitioned too; by default DeepSpeed keeps them whole and stage 3 would not be exercised.
PARTITIONED = "engine.deepspeed_extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"

_VALUES = {
    "seed": 3,
    "model": {"kind": "iresnet", "depth": 18, "embedding_dim": 8, "image_size": SIZE, "width": 0.125},
    "head": {"kind": "arcface", "margin": 0.3, "logit_scale": 16.0},
    "alignment": {"kind": "adversarial", "share": 0.5, "steps": 1},
    "data": {"shards": "drawn", "colour_order": "rgb", "augment": {"flip": 0.5, "photometric": 0.5}},
    "batch": {"global_batch": BATCH},
    # Learns in 6 steps, yet rounding does not push a unit over its kink, as it does at 3.0.
    "optim": {"lr_per_1024": 1.0},
    "schedule": {"epochs": 1.0},  # 6 steps
    "engine": {"zero_stage": 1, "precision": "bf16", "threads": 1},
    "checkpoint": {"every_steps": 3, "keep_last": 9},
    "log": {"every_steps": 1, "tensorboard": False},
}
ADAFACE = "head={kind: adaface, margin: 0.3, logit_scale: 16.0, statistics_momentum: 0.3, sample_rate: 0.5}"


def config_of(*overrides: str) -> TrainConfig:
    return parse_config(apply_overrides(_VALUES, overrides), TrainConfig, name="test")


class DrawnData:
    """`aroface.types.TrainingData`: a colour field per class with noise; remembers which samples were delivered."""

    num_samples, num_classes, fingerprint = SAMPLES, CLASSES, "drawn"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(SAMPLES) % CLASSES
        fields = torch.randint(0, 256, (CLASSES, SIZE, SIZE, 3), generator=generator)
        noise = torch.randint(-40, 41, (SAMPLES, SIZE, SIZE, 3), generator=generator)
        self.images = (fields[self.labels] + noise).clamp(0, 255).to(torch.uint8)
        self.delivered: list[list[int]] = []

    def batches(
        self, *, seed: int, start_position: int, num_batches: int, batch_size: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        for number in range(num_batches):
            first = start_position + number * batch_size * world_size
            positions = np.arange(first + rank, first + batch_size * world_size, world_size)
            samples = torch.from_numpy(Random(SAMPLES).samples_at(positions, seed=seed))
            self.delivered.append(samples.tolist())
            yield Batch(self.images[samples], self.labels[samples], samples)

    def describe(self, sample: int) -> str:
        return f"drawn: {sample:04d}"


@dataclass
class Trained:
    """What a training left behind."""

    losses: list[float]
    grad_norms: list[float | None]
    tensors: dict[str, torch.Tensor]  #: of the last checkpoint; the head's ranges put together
    delivered: list[list[int]]  #: samples of each micro-batch of this rank


def train(
    run: Path, *overrides: str, resume: Resume = "auto", evaluators: list[Evaluator] | None = None, stop_after: int = 0
) -> Trained:
    """Train to the end, or for `stop_after` steps as a signal would stop it; on all ranks of the process group."""
    data = DrawnData()
    trainer = Trainer(config_of(*overrides), data, run, resume=resume, evaluators=evaluators or [])
    if stop_after:
        _stop_after(trainer, stop_after)
    trainer.train()
    barrier()
    lines = metrics(run)
    last = sorted(run.glob("step-*"))[-1]
    return Trained(
        [line["loss"] for line in lines], [line["grad_norm"] for line in lines], tensors(last), data.delivered
    )


def _stop_after(trainer: Trainer, steps: int) -> None:
    step = trainer._step

    def counted(*args):
        result = step(*args)
        if trainer.position.step >= steps:
            trainer.request_stop()
        return result

    trainer._step = counted


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation" not in line]


def evaluations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation" in line]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of the head as at one rank."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, value in load_file(path).items():
            if not path.name.startswith("head-"):
                found[f"{path.name}/{name}"] = value
            elif value.dim() == 0 or f"head/{name}" not in found:
                found[f"head/{name}"] = value
            else:
                found[f"head/{name}"] = torch.cat([found[f"head/{name}"], value])
    return found


def forget_last(run: Path) -> None:
    """Remove the newest checkpoint, as if the run had stopped before it; on all ranks."""
    barrier()
    if rank() == 0:
        shutil.rmtree(sorted(run.glob("step-*"))[-1])
    barrier()


def packed(value: object) -> bytes:
    """For the way from a rank to the test: tensors would travel as handles that die with their process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
