"""One training step in every way of alignment, interleaved, against the plain step; and what a step is made of.

The steps are those of the trainer (DeepSpeed, sharded head, optimisers included) on random images. All ways share one
network and take turns: one step each on a CPU, in CPU time; four on a GPU, in wall time with one wait at their end, for
the host of a training waits for the step before at most. `published` is the attack of
the published code inside our step (release_compat): whole batch attacked, training mode. It runs on the GPU where there
is one (`CUDA_VISIBLE_DEVICES=` hides it). Limits are counted operations and bytes at the peaks of the same device,
measured in the same run; `launch/bench/step_limits.py` states the formulas.

The wait for data is that of plain steps fed from drawn faces in shards, through the trainer's loader, by the clock on
the wall. One rank runs, so collectives tell nobody anything: what they take is the bare calls, and nothing where the
engine makes none. `aroface bench engine` runs several ranks.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.largest import add_profile
from launch.bench.measure import Measurement, interleave
from launch.bench.output import Report, measured
from launch.bench.roofline import measure_peaks
from launch.bench.step_feed import collectives_s, copy_s, drawn_shards, fed_steps
from launch.bench.step_limits import StepLimits, limits_of
from launch.outputs import output_file

if TYPE_CHECKING:
    import torch

    from aroface.config import TrainConfig
    from aroface.engine.joint_update import StepReport
    from aroface.types import Batch

#: way -> what it changes in the section `alignment`
_WAYS: dict[str, dict[str, Any]] = {
    "plain": {"kind": "none"},
    "random": {"kind": "random"},
    "adversarial": {"kind": "adversarial"},
    "adversarial (batch)": {"kind": "adversarial", "batch_statistics": "batch"},
    "delayed": {"kind": "delayed"},
    "best_of 2": {"kind": "best_of", "candidates": 2},
    "best_of 4": {"kind": "best_of", "candidates": 4},
    "elastic": {"kind": "elastic"},
    "published": {"kind": "adversarial", "release_compat": True},
}
_GOALS = {"adversarial": 1.20, "adversarial (batch)": 1.20, "delayed": 1.05}
_WARP_SHARE = 0.02
_WAIT_SHARE = 0.02
_LR = 1e-4
_STEPS_ON_GPU = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--depth", type=int, default=18, metavar="N", help="depth of the IResNet")
    parser.add_argument("--image-size", type=int, default=112, metavar="PX", help="side of the images")
    parser.add_argument("--width", type=float, default=1.0, metavar="W", help="factor on its channels")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="images of a step")
    parser.add_argument("--classes", type=int, default=1000, metavar="C", help="identities")
    parser.add_argument("--share", type=float, default=0.25, metavar="P", help="share of the batch that is attacked")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="precision of the backbone; auto: bf16 where this device has units for it, else fp32",
    )
    parser.add_argument(
        "--contiguous", action="store_true", help="keep images and activations in NCHW instead of channels last"
    )
    parser.add_argument(
        "--head",
        choices=("auto", "plain", "chunked", "triton"),
        default="auto",
        help="how the head forms its softmax",
    )
    parser.add_argument(
        "--logit-precision", choices=("fp32", "bf16"), default="fp32", help="precision of the products of the head"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for the backbone")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="replay the passes through the backbone from CUDA graphs, on a GPU"
    )
    parser.add_argument("--plain-norms", action="store_true", help="batch norms by PyTorch instead of fused, on a GPU")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage of the engine")
    parser.add_argument(
        "--layouts",
        action="store_true",
        help="instead: plain steps in fp32 and contiguous against channels last, in bf16 too (and compiled)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="counted turns of every way")
    parser.add_argument("--ways", default=",".join(_WAYS), metavar="A,B", help="comma-separated, of: %(default)s")
    parser.add_argument(
        "--profile",
        type=output_file,
        metavar="FILE",
        help="write a trace of every way for chrome://tracing, name the largest",
    )
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.layouts:
        from launch.bench.layouts import compare_layouts

        return compare_layouts(args)
    import torch

    bench = StepBench(args, [name.strip() for name in args.ways.split(",")])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"device": bench.device_name, "precision": bench.config.engine.precision}
    report = Report("step", ("torch", "deepspeed"), settings)
    uses_cpu_time = bench.device.type == "cpu"
    peaks = measure_peaks(threads=args.threads, device=bench.device.type)
    if not uses_cpu_time:
        torch.cuda.reset_peak_memory_stats()  # what the peaks took is not the step's
    limits = limits_of(bench.config, classes=args.classes, peaks=peaks)
    measurements = {m.name: m for m in interleave(bench.ways, rounds=args.rounds)}
    unit = "CPU-ms per image" if uses_cpu_time else "ms per image"
    report.details["steps"] = {name: measured(m) for name, m in measurements.items()}
    for name, measurement in measurements.items():
        limit = 1000 * limits.step_s(_config(args, _WAYS[name]).alignment) / args.batch
        seconds = measurement.cpu_s if uses_cpu_time else measurement.wall_s
        report.add(f"{name}, step", 1000 * seconds / measurement.items, unit, limit=limit)
        if not uses_cpu_time:
            report.add(f"{name}, images per second", measurement.items_per_s, "img/s")
    for name, measurement in measurements.items():
        if name != "plain":
            ratios = _ratios(measurement, measurements["plain"], uses_cpu_time)
            report.details.setdefault("ratios", {})[name] = ratios
            report.add(f"{name} / plain", statistics.median(ratios), "x", at_most=_GOALS.get(name))
    _add_parts(report, bench, limits, unit, args)
    _add_waits(report, bench, args)
    if bench.device.type == "cuda":
        report.add("peak memory, all ways", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if args.precision == "fp16":
        report.add("steps without an update, for an fp16 overflow", bench.skipped, "of all")
    if args.profile is not None:
        add_profile(report, bench.steps, args.profile, bench.device)
    report.write(args.out)
    return 0


def _add_parts(report: Report, bench: "StepBench", limits: StepLimits, unit: str, args: argparse.Namespace) -> None:
    parts = bench.parts(rounds=args.rounds)
    least = limits.parts_s(bench.config.alignment)
    for name, seconds in parts.items():
        limit = 1000 * least[name] / args.batch if name in least else None
        report.add(f"adversarial step, {name}", 1000 * seconds / args.batch, unit, limit=limit)
    whole = sum(seconds for name, seconds in parts.items() if name != "warp alone")
    for name, seconds in parts.items():
        goal = _WARP_SHARE * 100 if name == "warp alone" else None
        report.add(f"part of an adversarial step: {name}", 100 * seconds / whole, "%", at_most=goal)


def _add_waits(report: Report, bench: "StepBench", args: argparse.Namespace) -> None:
    with drawn_shards(bench.config, classes=args.classes) as data:
        wait_s, step_s = fed_steps(data, bench.train_on, batch=args.batch, steps=args.rounds, device=bench.device)
    report.add("plain step fed by the loader, wall time", 1000 * step_s / args.batch, "ms per image")
    report.add("of it waiting for data", 100 * wait_s / step_s, "%", at_most=100 * _WAIT_SHARE)
    if bench.device.type == "cuda":
        copy = 1000 * copy_s(bench.batch, bench.device) / args.batch
        report.add("copy to the device, alone", copy, "ms per image")
    seconds = collectives_s(bench.steps["plain"])
    report.add("collectives of a plain step, one rank", 1000 * seconds / args.batch, "ms per image")


def _ratios(slower: Measurement, plain: Measurement, uses_cpu_time: bool) -> list[float]:
    """Of every round, so that a busy neighbour counts on both sides."""
    column = 1 if uses_cpu_time else 0
    return [a[column] / max(b[column], 1e-9) for a, b in zip(slower.rounds, plain.rounds, strict=True)]


class StepBench:
    """One network and head, stepped in turn by tasks that differ in the section `alignment` alone."""

    def __init__(self, args: argparse.Namespace, names: list[str]) -> None:
        import torch

        from aroface.config.alignment import STEPS_TO_SETTLE
        from aroface.engine.deepspeed_engine import BackboneEngine, start_distributed
        from aroface.engine.joint_update import JointUpdate
        from aroface.engine.precision import with_precision
        from aroface.engine.task import FaceTask
        from aroface.errors import ConfigError
        from aroface.heads import HeadSGD, build_head
        from aroface.models import build_backbone

        unknown = [name for name in names if name not in _WAYS]
        if unknown or "plain" not in names:
            raise ConfigError(f"--ways {','.join(names)}: choose of {', '.join(_WAYS)}, with plain among them.")
        self.device = start_distributed()
        torch.set_num_threads(args.threads)
        self._config = with_precision(_config(args, {"kind": "adversarial"}), self.device)
        torch.manual_seed(0)
        backbone = build_backbone(self._config.model).to(self.device)
        self._engine = BackboneEngine(backbone, self._config, 1)
        self._engine.train()
        dim = self._config.model.embedding_dim
        self._head = build_head(self._config.head, num_classes=args.classes, embedding_dim=dim, seed=0).to(self.device)
        optimizer = HeadSGD(self._head, momentum=0.9, weight_decay=5e-4)
        self._update = JointUpdate(self._engine, self._head, optimizer, self._config.optim, self._engine.scaler)
        self._batch = _batch(args, self.device)
        tasks = {
            name: FaceTask(_config(args, _WAYS[name]), self._engine, self._head, device=self.device, rank=0)
            for name in names
        }
        self._plain_task = tasks["plain"]
        #: Number of the next step of each way: far enough in a training for the attack to use running averages.
        self._next: dict[str, int] = defaultdict(lambda: STEPS_TO_SETTLE)
        self.skipped = 0  #: steps whose fp16 gradient overflowed, and which therefore had no optimisers
        steps = _STEPS_ON_GPU if self.device.type == "cuda" else 1
        #: One turn, and one step, of each way; both return the number of images and wait for the device.
        self.ways: Mapping[str, Callable[[], int]] = {n: partial(self._turn, n, t, steps) for n, t in tasks.items()}
        self.steps: Mapping[str, Callable[[], int]] = {n: partial(self._turn, n, t, 1) for n, t in tasks.items()}

    @property
    def config(self) -> "TrainConfig":
        """Of the adversarial step."""
        return self._config

    @property
    def batch(self) -> "Batch":
        """What all ways step on."""
        return self._batch

    @property
    def device_name(self) -> str:
        """`cpu`, or the name of the card."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def train_on(self, batch: "Batch") -> None:
        """A plain step on another batch."""
        self._step("plain", self._plain_task, batch)
        self._synchronise()

    def _turn(self, name: str, task: Any, steps: int) -> int:
        reports = [self._step(name, task, self._batch) for _ in range(steps)]
        self._synchronise()
        for report in reports:
            _check_taken(report, name)
            self.skipped += report.was_skipped
        return steps * len(self._batch.labels)

    def _step(self, name: str, task: Any, batch: "Batch") -> "StepReport":
        step = self._next[name]
        self._next[name] += 1
        output = task(batch, step=step, micro_step=step)
        self._engine.backward(output.loss)
        return self._update(output.loss.detach()[None], _LR)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def parts(self, *, rounds: int) -> dict[str, float]:
        """Median seconds of the parts of an adversarial step; `warp alone` is contained in the attack."""
        found: dict[str, list[float]] = defaultdict(list)
        for number in range(rounds + 1):
            for name, seconds in self._parts_once(number).items():
                if number:  # the first round warms up
                    found[name].append(seconds)
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def _parts_once(self, number: int) -> dict[str, float]:
        import torch

        from aroface.alignment import frozen_statistics, realign, warp
        from aroface.alignment.attack import random_corner
        from aroface.augment import augment
        from aroface.config.alignment import STEPS_TO_SETTLE
        from aroface.engine.seeding import derive_generator
        from aroface.preprocess import normalise

        config, engine, head = self._config, self._engine, self._head
        layout = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        clock = _Clock(self._synchronise, uses_cpu_time=self.device.type == "cpu")
        generator = derive_generator(0, "bench", step=number, device=self.device)
        images = normalise(self._batch.images, _contract(config))
        images = augment(images, config.data.augment, generator)
        labels = self._batch.labels
        clock.lap("normalise and augment")

        def losses(warped: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
            embeddings = engine.beside(warped.contiguous(memory_format=layout))
            return head.losses(embeddings, targets, step=0, update_statistics=False)

        with frozen_statistics(engine.module, config.alignment.statistics_at(STEPS_TO_SETTLE)):
            aligned = realign(images, labels, config=config.alignment, loss_of=losses, generator=generator)
        images = aligned.images.contiguous(memory_format=layout)
        clock.lap("attack")
        embeddings = engine(images)
        clock.lap("forward")
        loss = head(embeddings, labels, step=0)
        clock.lap("head, forward")
        engine.backward(loss)
        clock.lap("backward")
        self._update(loss.detach()[None], _LR)
        clock.lap("optimisers")
        count = len(aligned.chosen)
        psi = random_corner(count, config.alignment, generator)
        clock.lap("")
        with torch.no_grad():  # what `random` adds to a plain step: the share, drawn, warped and put back
            images.index_copy(0, aligned.chosen, warp(images[aligned.chosen], psi, fill=-1.0))
        clock.lap("warp alone")
        return {name: seconds for name, seconds in clock.laps.items() if name}


def _check_taken(report: "StepReport", name: str) -> None:
    from aroface.engine.joint_update import NonFiniteError
    from aroface.errors import ArofaceError

    try:
        report.check()
    except NonFiniteError as error:
        raise ArofaceError(
            f"A step of the way {name} was not taken: the {error} is not finite. Its time would say nothing; leave the "
            "way out, or choose another --precision."
        ) from error


class _Clock:
    """Seconds between laps."""

    def __init__(self, synchronise: Callable[[], None], *, uses_cpu_time: bool) -> None:
        self._synchronise = synchronise
        self._now = time.process_time if uses_cpu_time else time.perf_counter
        self.laps: dict[str, float] = {}
        synchronise()
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Note the time since the lap before."""
        self._synchronise()
        now = self._now()
        self.laps[name] = now - self._last
        self._last = now


def _contract(config: "TrainConfig") -> Any:
    from aroface.engine.task import contract_of

    return contract_of(config)


def _config(args: argparse.Namespace, alignment: Mapping[str, Any]) -> "TrainConfig":
    from aroface.config import TrainConfig, parse_config

    values = {
        "seed": 0,
        "model": {"kind": "iresnet", "depth": args.depth, "image_size": args.image_size, "width": args.width},
        "head": {
            "kind": "arcface",
            "margin": 0.5,
            "implementation": args.head,
            "logit_precision": args.logit_precision,
        },
        "alignment": {"share": args.share, **alignment},
        "data": {"shards": "unused", "colour_order": "rgb"},
        "batch": {"global_batch": args.batch},
        "optim": {},
        "schedule": {"epochs": 1.0},
        "engine": {
            "precision": args.precision,
            "channels_last": not args.contiguous,
            "compile": args.compile,
            "fused_norms": not args.plain_norms,
            "cuda_graphs": args.cuda_graphs,
            "zero_stage": args.zero_stage,
            "threads": args.threads,
        },
    }
    return parse_config(values, TrainConfig, name="the options")


def _batch(args: argparse.Namespace, device: "torch.device") -> "Batch":
    import torch

    from aroface.types import Batch

    generator = torch.Generator().manual_seed(0)
    side = args.image_size
    images = torch.randint(0, 256, (args.batch, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, args.classes, (args.batch,), generator=generator)
    return Batch(images.to(device), labels.to(device), torch.arange(args.batch))
