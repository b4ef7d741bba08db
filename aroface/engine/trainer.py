"""The loop. It knows a stream of batches, a task that turns one into a loss, and checkpoints."""

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from aroface.config.schema import TrainConfig
from aroface.distributed import any_rank, barrier, rank, world_size
from aroface.engine.checkpoint import (
    RunPosition,
    initial_checkpoint,
    load_backbone,
    load_task_state,
    restore_optimizers,
    save_checkpoint,
)
from aroface.engine.deepspeed_engine import BackboneEngine, NonFiniteGradientError, start_distributed
from aroface.engine.metrics import Meter, MetricsLog, TrainingProgress
from aroface.engine.prefetch import on_device
from aroface.engine.run_directory import choose_checkpoint, record_run
from aroface.engine.schedule import accumulation_steps, learning_rate, total_steps
from aroface.engine.seeding import derive_seed
from aroface.engine.task import FaceTask
from aroface.errors import ArofaceError
from aroface.heads import HeadSGD, build_head
from aroface.models import build_backbone
from aroface.types import Batch, TrainingData

__all__ = ["Resume", "Trainer", "TrainingResult"]

Resume = Literal["auto", "never"] | Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where a run stands when the loop returns."""

    position: RunPosition
    total_steps: int
    loss: float | None  #: mean of the last log line; None when no step was taken
    was_interrupted: bool


class Trainer:
    """Sets a run up and trains it.

    Args:
        config: the run.
        data: training set; its fingerprint is tied to the checkpoints.
        run: run directory.
        resume: `auto` continues from the newest whole checkpoint of `run` if there is one; a path from that checkpoint
            or run; `never` wants an empty run directory.
        overrides: settings changed on the command line, kept for the record.

    Raises:
        ConfigError: settings that do not fit the data or the ranks.
        CheckpointError: nothing to resume at a path, or a checkpoint of another run.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, run: Path, *, resume: Resume, overrides: Sequence[str] = ()
    ) -> None:
        self.config, self._data, self._run = config, data, run
        self.device = start_distributed()
        self._rank, self._world = rank(), world_size()
        if config.engine.threads is not None:
            torch.set_num_threads(config.engine.threads)
        self._accumulation = accumulation_steps(config, self._world)
        self._micro_batch = config.batch.global_batch // (self._accumulation * self._world)
        self.total_steps = total_steps(config, data.num_samples)
        self._overrides = tuple(overrides)
        self._build(choose_checkpoint(run, config, resume))
        barrier()  # every rank has looked at the run directory before rank 0 writes there
        self._stop_requested = False

    def _build(self, directory: Path | None) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "backbone weights"))
        backbone = build_backbone(config.model)
        source = directory or initial_checkpoint(config)
        if source:
            load_backbone(source, backbone)
            logger.info("The weights are those of %s.", source)
        # The weights stay contiguous, for DeepSpeed flattens them; the layout of the images decides that of the rest.
        self._engine = BackboneEngine(backbone.to(self.device), config, self._world)
        self._head = build_head(
            config.head,
            num_classes=self._data.num_classes,
            embedding_dim=config.model.embedding_dim,
            seed=config.seed,
            rank=self._rank,
            world_size=self._world,
        ).to(self.device)
        optim = config.optim
        self._head_optimizer = HeadSGD(self._head, momentum=optim.momentum, weight_decay=optim.weight_decay)
        self._task = FaceTask(config, self._engine, self._head, device=self.device, rank=self._rank)
        self.position = RunPosition(0, 0)
        if directory:
            self.position = restore_optimizers(
                directory,
                engine=self._engine,
                head=self._head,
                head_optimizer=self._head_optimizer,
                fingerprint=self._data.fingerprint,
            )
            self._task.load_state_tensors(load_task_state(directory, rank=self._rank, world_size=self._world))
            logger.info("Resumed from %s at step %d of %d.", directory, self.position.step, self.total_steps)

    def describe(self) -> str:
        """Two lines on what will run."""
        config, parameters = self.config, sum(p.numel() for p in self._engine.module.parameters())
        return (
            f"{config.model.name} with {parameters / 1e6:.2f} M parameters, {config.head.kind}, "
            f"alignment {config.alignment.kind}; {self._data.num_samples} images of {self._data.num_classes} "
            "identities\n"
            f"{self.total_steps} steps: micro-batch {self._micro_batch} x accumulation {self._accumulation} x "
            f"{self._world} rank(s) = global batch {config.batch.global_batch}; peak learning rate {config.peak_lr:.4g}"
        )

    def check(self) -> float:
        """Two micro-batches through the whole task without an update; returns the loss of the second."""
        loss = math.nan
        for batch in self._batches(2):
            loss = float(self._task(batch, step=0, micro_step=0).loss.detach())
        return loss

    def train(self) -> TrainingResult:
        """Run to the end, or to the first SIGTERM or SIGINT; saves before it returns.

        Raises:
            ArofaceError: loss or gradient is not finite on some rank; nothing of that step was applied.
        """
        config = self.config
        log = None
        if self._rank == 0:
            record_run(self._run, config, deepspeed=self._engine.settings, overrides=self._overrides)
            log = MetricsLog(self._run, resumed_step=self.position.step, tensorboard=config.log.tensorboard)
        self._engine.train()
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with TrainingProgress(
                total_steps=self.total_steps, first_step=self.position.step, is_shown=self._rank == 0
            ) as progress:
                return self._loop(log, progress)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if log:
                log.close()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _loop(self, log: MetricsLog | None, progress: TrainingProgress) -> TrainingResult:
        config = self.config
        save_every = config.checkpoint.every_steps or math.ceil(self._data.num_samples / config.batch.global_batch)
        remaining = self.total_steps - self.position.step
        batches = self._batches(remaining * self._accumulation)
        meter, last_loss, saved, stop = Meter(), None, self.position.step, False
        while self.position.step < self.total_steps and not stop:
            lr = self._step(batches, meter)
            step = self.position.step
            if step % config.log.every_steps == 0 or step == self.total_steps:
                line = meter.line(
                    step=step, samples=self.position.samples_seen, lr=lr, grad_norm=self._engine.grad_norm()
                )
                last_loss = line.loss
                if log:
                    log.write(line)
                progress.show(line, images_per_step=config.batch.global_batch)
            stop = any_rank(self._stop_requested)
            if step % save_every == 0 or step == self.total_steps or stop:
                self._save()
                saved = step
        if stop and saved < self.total_steps:
            logger.info("Stopped by a signal after step %d; saved. The same command continues the run.", saved)
        return TrainingResult(self.position, self.total_steps, last_loss, was_interrupted=saved < self.total_steps)

    def _step(self, batches: Iterator[Batch], meter: Meter) -> float:
        """One optimiser step; returns its learning rate."""
        step = self.position.step
        lr = learning_rate(self.config, step, num_samples=self._data.num_samples)
        losses, wait_s, attack_s, samples = [], 0.0, 0.0, []
        for micro in range(self._accumulation):
            started = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - started
            samples.append(batch.samples)
            output = self._task(batch, step=step, micro_step=step * self._accumulation + micro)
            attack_s += output.attack_s
            losses.append(output.loss.detach())
            self._engine.backward(output.loss)
            if self._engine.is_boundary():
                self._update(torch.stack(losses), lr, torch.cat(samples))
            else:
                self._engine.step(lr)
        self.position = RunPosition(step + 1, self.position.samples_seen + self.config.batch.global_batch)
        meter.add(
            loss=torch.stack(losses).mean(), images=self.config.batch.global_batch, wait_s=wait_s, attack_s=attack_s
        )
        return lr

    def _update(self, losses: torch.Tensor, lr: float, samples: torch.Tensor) -> None:
        """Check on all ranks, then change the weights."""
        gradient = self._head.gradient()
        # The largest entry tells as much as a mask of all of them, which would be as large as the centres.
        largest = losses.new_zeros(()) if gradient is None else torch.linalg.vector_norm(gradient, torch.inf)
        is_finite = bool(torch.isfinite(losses).all() & torch.isfinite(largest))
        if any_rank(not is_finite):
            raise self._non_finite("loss or a class-centre gradient", losses, samples)
        try:
            self._engine.step(lr)
        except NonFiniteGradientError as error:
            raise self._non_finite("gradient of the backbone", losses, samples) from error
        self._head_optimizer.step(lr)

    def _non_finite(self, what: str, losses: torch.Tensor, samples: torch.Tensor) -> ArofaceError:
        names = ", ".join(self._data.describe(sample) for sample in samples[:8].tolist())
        return ArofaceError(
            f"Step {self.position.step + 1}: the {what} is not finite (loss {float(losses.mean()):.4g} on rank "
            f"{self._rank}). Nothing was updated; the newest checkpoint is good. The batch of this rank begins with "
            f"{names}. Look at these images, lower optim.lr_per_1024, lengthen schedule.warmup_epochs, or set "
            "engine.precision: fp32."
        )

    def _batches(self, count: int) -> Iterator[Batch]:
        batches = self._data.batches(
            seed=self.config.seed,
            start_position=self.position.samples_seen,
            num_batches=count,
            batch_size=self._micro_batch,
            rank=self._rank,
            world_size=self._world,
        )
        return on_device(batches, self.device)

    def _save(self) -> None:
        save_checkpoint(
            self._run,
            self.position,
            config=self.config,
            engine=self._engine,
            head=self._head,
            head_optimizer=self._head_optimizer,
            fingerprint=self._data.fingerprint,
            task_state=self._task.state_tensors(),
        )
