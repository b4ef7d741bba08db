"""The loop. It knows a stream of batches, a task that turns one into a loss, and checkpoints."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from aroface.config.schema import TrainConfig
from aroface.distributed import (
    AnyRankLater,
    any_rank,
    any_rank_each,
    barrier,
    from_first_rank,
    peer_failure,
    rank,
    world_size,
)
from aroface.engine.applied import AppliedStep
from aroface.engine.best import Best, write_best
from aroface.engine.checkpoint import (
    RunPosition,
    initial_checkpoint,
    load_backbone,
    load_task_state,
    restore_optimizers,
    take_snapshot,
)
from aroface.engine.checkpoint_layout import STATE_FILE, best_of, list_checkpoints, remove_torn
from aroface.engine.compiled import warm_up
from aroface.engine.deepspeed_engine import BackboneEngine, start_distributed
from aroface.engine.evaluation import PeriodicEvaluation
from aroface.engine.joint_update import JointUpdate, StepReport
from aroface.engine.metrics import Meter, MetricsLog, TrainingProgress
from aroface.engine.peers import LostRanksError, lost_while_training, start_up_faults
from aroface.engine.precision import with_precision
from aroface.engine.prefetch import on_device
from aroface.engine.run_directory import choose_checkpoint, hold_run, record_run
from aroface.engine.saver import CheckpointSaver
from aroface.engine.schedule import accumulation_steps, learning_rate, total_steps
from aroface.engine.seeding import derive_seed
from aroface.engine.task import FaceTask, contract_of
from aroface.engine.watchdog import Watchdog
from aroface.errors import CheckpointError
from aroface.files import writing
from aroface.heads import HeadSGD, build_head
from aroface.inference import TorchEmbedder, TrainedModel
from aroface.models import build_backbone
from aroface.types import Batch, Evaluator, TrainingData

__all__ = ["LostRanksError", "Resume", "Trainer", "TrainingResult"]

Resume = Literal["auto", "never"] | Path

#: Seconds that a save may still take after training has ended with an error.
_PATIENCE_S = 60.0

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
        evaluators: one per entry of `evaluate.sets`, in order.

    Raises:
        ConfigError: settings that do not fit the data or the ranks.
        CheckpointError: nothing to resume at a path, or a checkpoint of another run.
    """

    @start_up_faults()
    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        run: Path,
        *,
        resume: Resume,
        overrides: Sequence[str] = (),
        evaluators: Sequence[Evaluator] = (),
    ) -> None:
        self._data, self._run = data, run
        self.device = start_distributed(config.engine.timeout_s)
        self.config = config = with_precision(config, self.device)
        self._rank, self._world = rank(), world_size()
        if config.engine.threads is not None:
            torch.set_num_threads(config.engine.threads)
        self._accumulation = accumulation_steps(config, self._world)
        self._micro_batch = config.batch.global_batch // (self._accumulation * self._world)
        self.total_steps = total_steps(config, data.num_samples)
        self._overrides = tuple(overrides)
        self._seen = list_checkpoints(run)
        directory = from_first_rank(lambda: choose_checkpoint(run, config, resume))
        _check_seen(directory)
        self._build(directory)
        self._earlier_best = best_of(directory, run)
        self._evaluation = (
            PeriodicEvaluation(config.evaluate, evaluators, best=self._earlier_best) if config.evaluate else None
        )
        self._watchdog = Watchdog(2 * config.engine.timeout_s)
        self._saver = CheckpointSaver(
            run,
            config.checkpoint,
            rank=self._rank,
            on_wait=self._watchdog.beat,
            patience_s=4 * config.engine.timeout_s,
        )
        barrier()  # every rank has looked at the run directory before rank 0 writes there
        self._stop_requested = False
        # Gloo waits in any case, and answers at once.
        self._ask = AnyRankLater() if self._world > 1 and self.device.type == "cuda" else any_rank_each
        self._unsettled: tuple[AppliedStep, StepReport] | None = None

    def _build(self, directory: Path | None) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "backbone weights"))
        backbone = build_backbone(config.model)
        source = directory or from_first_rank(lambda: initial_checkpoint(config))
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
        self._update = JointUpdate(self._engine, self._head, self._head_optimizer, optim, self._engine.scaler)
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

    @property
    def _best(self) -> Best | None:
        return self._evaluation.best if self._evaluation else self._earlier_best

    def describe(self) -> str:
        """Two lines on what will run."""
        config, parameters = self.config, sum(p.numel() for p in self._engine.module.parameters())
        return (
            f"{config.model.name} with {parameters / 1e6:.2f} M parameters, {config.head.kind}, "
            f"alignment {config.alignment.kind}, {config.engine.precision}; "
            f"{self._data.num_samples} images of {self._data.num_classes} identities\n"
            f"{self.total_steps} steps: micro-batch {self._micro_batch} x accumulation {self._accumulation} x "
            f"{self._world} rank(s) = global batch {config.batch.global_batch}; peak learning rate {config.peak_lr:.4g}"
        )

    @start_up_faults()
    def check(self) -> float:
        """One whole step, as large as those of the training, and every evaluation; keeps nothing; returns the loss."""
        meter = Meter()
        self._engine.train()
        lr = self._step(self._batches(self._accumulation), meter)
        grad_norm = self._settle()
        if self._evaluation:
            self._evaluation.run(self._embedder(), step=0, samples=0)
        return meter.line(step=1, samples=0, lr=lr, grad_norm=grad_norm).loss

    def train(self) -> TrainingResult:
        """Run to the end, or until `request_stop`; saves before it returns.

        Raises:
            ArofaceError: loss or gradient is not finite on some rank, and nothing of that step was applied; a save
                failed; another rank is gone or hangs; another job is at work in the run directory.
        """
        with ExitStack() as stack:
            with start_up_faults():
                from_first_rank(lambda: self._claim(stack))
            return self._train()

    def _claim(self, stack: ExitStack) -> None:
        """Keep other jobs out until `stack` ends; what one of them did since this one looked is not continued."""
        stack.enter_context(hold_run(self._run))
        if list_checkpoints(self._run) != self._seen:
            raise CheckpointError(
                f"The checkpoints in {self._run} changed while this job was set up: another job wrote there. Give the "
                "same command again to continue from where it ended."
            )

    def _train(self) -> TrainingResult:
        config = self.config
        log = None
        if self._rank == 0:
            with writing(self._run):
                record_run(self._run, config, deepspeed=self._engine.settings, overrides=self._overrides)
                remove_torn(self._run)
                write_best(self._run, self._best)
                log = MetricsLog(self._run, resumed_step=self.position.step, tensorboard=config.log.tensorboard)
        self._engine.train()
        self._warm_up()
        try:
            with ExitStack() as stack:
                stack.enter_context(self._watchdog)
                progress = stack.enter_context(
                    TrainingProgress(
                        total_steps=self.total_steps, first_step=self.position.step, is_shown=self._rank == 0
                    )
                )
                return self._loop(log, progress)
        except RuntimeError as error:
            if peer_failure(error):
                raise lost_while_training(error, self.position.step, config.engine.timeout_s) from error
            raise
        finally:
            self._saver.close(patience_s=min(_PATIENCE_S, config.engine.timeout_s))
            if log:
                log.close()

    def _warm_up(self) -> None:
        """Let the compiler have its minutes and graphs be recorded before the first step, on a batch of noise."""
        graphed, steps = self._engine.graphed, range(self.position.step, self.total_steps)
        if not steps or not (self.config.engine.compile or graphed):
            return
        if graphed:
            self._task.rehearse(self._micro_batch, steps)
            graphed.settle(is_told=self._rank == 0)
        else:
            rehearse = partial(self._task.rehearse, self._micro_batch, steps)
            warm_up(self._engine.backbone, rehearse, is_told=self._rank == 0)

    def request_stop(self) -> None:
        """Let `train` finish its step, save and return, on all ranks; a signal handler may call it, on any of them."""
        self._stop_requested = True

    def _loop(self, log: MetricsLog | None, progress: TrainingProgress) -> TrainingResult:
        config = self.config
        save_every = config.checkpoint.every_steps or math.ceil(self._data.num_samples / config.batch.global_batch)
        remaining = self.total_steps - self.position.step
        batches = self._batches(remaining * self._accumulation)
        meter, last_loss, saved, stop = Meter(), None, self.position.step, False
        while self.position.step < self.total_steps and not stop:
            lr = self._step(batches, meter)
            self._watchdog.beat()
            step, is_last = self.position.step, self.position.step == self.total_steps
            if step % config.log.every_steps == 0 or is_last:
                grad_norm = self._settle()
                line = meter.line(step=step, samples=self.position.samples_seen, lr=lr, grad_norm=grad_norm)
                last_loss = line.loss
                if log:
                    log.write(line)
                progress.show(line, images_per_step=config.batch.global_batch)
            is_due = self._evaluation is not None and self._evaluation.is_due(step, is_last=is_last)
            # Where the host waits in any case, the answer is that of this step.
            ask = any_rank_each if is_last or is_due else self._ask
            stop, has_failed = ask([self._stop_requested, self._saver.has_failed])
            if has_failed:
                self._saver.fail()
            is_best = is_due and not stop and self._evaluate(log, meter)
            if step % save_every == 0 or is_last or stop or is_best:
                self._save()
                saved = step
        self._saver.settle()
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
                self._apply(torch.stack(losses), lr, torch.cat(samples))
            else:
                self._engine.step(lr)
        self.position = RunPosition(step + 1, self.position.samples_seen + self.config.batch.global_batch)
        meter.add(
            loss=torch.stack(losses).mean(), images=self.config.batch.global_batch, wait_s=wait_s, attack_s=attack_s
        )
        return lr

    def _apply(self, losses: torch.Tensor, lr: float, samples: torch.Tensor) -> None:
        """Change the weights, unless something is not finite on some rank, which `_settle` tells.

        The step before is settled first, when this one has been asked of the device: the host is one step ahead.
        """
        self._settle()
        step, precision = self.position.step + 1, self.config.engine.precision
        applied = AppliedStep(step, losses, samples, self._data.describe, self._run, precision)
        with applied.faults():
            report = self._update(losses, lr)
        if report.was_skipped:
            scale = self._engine.scaler.scale
            logger.info("Step %d: the fp16 gradient overflowed; skipped, loss scale now %g.", applied.number, scale)
        self._unsettled = applied, report

    def _settle(self) -> float:
        """Wait until the last step has been decided on; returns the norm of its gradient."""
        if self._unsettled is None:
            return math.nan
        applied, report = self._unsettled
        with applied.faults():
            report.check()
        return report.grad_norm

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

    def _evaluate(self, log: MetricsLog | None, meter: Meter) -> bool:
        """Evaluate; returns whether this is the best model so far."""
        evaluation, step = self._evaluation, self.position.step
        assert evaluation is not None  # noqa: S101 - it is due
        self._settle()
        with meter.pause():
            lines = evaluation.run(
                self._embedder(), step=step, samples=self.position.samples_seen, on_progress=self._watchdog.beat
            )
        for line in lines if log else []:
            assert log is not None  # noqa: S101 - the loop is empty otherwise
            log.write_evaluation(line)
            shown = ", ".join(f"{key} {value:.4f}" for key, value in line.metrics.items() if value is not None)
            logger.info("step %6d  %s: %s%s", step, line.evaluation, shown, "  (best so far)" if line.is_best else "")
        return from_first_rank(lambda: any(line.is_best for line in lines))

    def _embedder(self) -> TorchEmbedder:
        """The model as it would be saved now, as a copy of its own on every rank; training does not notice."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            backbone = build_backbone(config.model)
        backbone.load_state_dict(self._engine.weights(settle=False))
        model = TrainedModel(backbone.eval(), contract_of(config), config.model.kind, f"step-{self.position.step:08d}")
        assert config.evaluate is not None  # noqa: S101 - the caller asked
        return TorchEmbedder(model, batch_size=config.evaluate.batch_size, device=str(self.device))

    def _save(self) -> None:
        self._settle()
        snapshot = take_snapshot(
            self.position,
            config=self.config,
            engine=self._engine,
            head=self._head,
            head_optimizer=self._head_optimizer,
            fingerprint=self._data.fingerprint,
            task_state=self._task.state_tensors(),
            best=self._best,
        )
        self._saver.start(snapshot)


def _check_seen(directory: Path | None) -> None:
    if any_rank(directory is not None and not (directory / STATE_FILE).is_file()):
        raise CheckpointError(
            f"{directory} is not seen by every rank. Put the run directory on storage that all nodes share."
        )
