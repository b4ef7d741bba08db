"""The classifier: time and memory of plain, chunked and sampled heads, against arcface_torch's arithmetic.

One forward and backward pass of ArcFace with a straight-through margin, which all of them compute. Times are CPU times
of one thread, variants interleaved; memory is what a process needs beyond the centres and the embeddings, each variant
in a process of its own. The limit of a pass is its arithmetic: 6 N C D operations for the logits and two gradients (N
images, C classes that take part, D = 512) in its precision, or the centres read and their gradient written once. A head
in chunks forms its logits twice, 8 N C D, and still is held against the 6 that the result needs. `--full` adds the head
of WebFace12M (617,970 classes) with its optimiser, which takes about 5 GiB. `--device cuda`
measures passes on a GPU instead, by wall time and the memory allocated there.
"""

import argparse
import functools
import logging
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from aroface.errors import ConfigError
from launch.bench.head_ranks import expected_bytes, traffic
from launch.bench.measure import interleave, peak_growth, ratio
from launch.bench.output import Report, measured
from launch.bench.roofline import Peaks, measure_peaks
from launch.outputs import output_file

if TYPE_CHECKING:
    import torch

DIM, _SCALE, _MARGIN = 512, 64.0, 0.5
_FULL_CLASSES, _FULL_BATCH = 617_970, 1024
#: name -> settings of our head
OURS: dict[str, dict[str, Any]] = {
    "chunked fp32": {},
    "chunked bf16": {"logit_precision": "bf16"},
    "sampled 0.3": {"sample_rate": 0.3},
    "sampled 0.1": {"sample_rate": 0.1},
    "sampled 0.3 bf16": {"sample_rate": 0.3, "logit_precision": "bf16"},
    "sampled 0.1 bf16": {"sample_rate": 0.1, "logit_precision": "bf16"},
}
#: The same on GPUs alone.
FUSED: dict[str, dict[str, Any]] = {
    "fused fp32": {"implementation": "triton"},
    "fused bf16": {"implementation": "triton", "logit_precision": "bf16"},
}
_PEERS: dict[str, dict[str, Any]] = {
    "arcface_torch": {},
    "arcface_torch 0.3": {"sample_rate": 0.3},
    "arcface_torch 0.1": {"sample_rate": 0.1},
}

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="images of the global batch")
    parser.add_argument("--classes", type=int, default=50_000, metavar="C", help="identities")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="counted rounds")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: passes by wall time, and their memory"
    )
    parser.add_argument("--full", action="store_true", help="memory at 617,970 classes too")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    torch.set_num_threads(1)
    settings = {"batch": args.batch, "classes": args.classes, "dim": DIM, "rounds": args.rounds, "threads": 1}
    if args.device == "cuda":
        return _on_gpu(args, settings)
    report = Report("head", ("torch", "numpy"), settings)
    _agreement(report, args.batch, args.classes)
    _times(report, args.batch, args.classes, args.rounds)
    _memory(report, args.batch, args.classes)
    if args.full:
        _full_size(report)
    _exchanges(report)
    report.write(args.out)
    return 0


def _on_gpu(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    import torch

    from launch.bench.head_on_gpu import measure_on

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here. Leave the option out to measure the CPU.")
    device = torch.device("cuda", 0)
    report = Report("head", ("torch", "numpy"), {**settings, "device": torch.cuda.get_device_name(device)})
    measure_on(device, report, batch=args.batch, classes=args.classes, rounds=args.rounds, bf16=True)
    report.write(args.out)
    return 0


def _variants(batch: int, classes: int) -> Mapping[str, Callable[[], "Pass"]]:
    names = ["arcface_torch", "plain", *OURS, "arcface_torch 0.3", "arcface_torch 0.1"]
    return {name: functools.partial(Pass, name, batch, classes) for name in names}


class Pass:
    """Inputs of one variant, the same for all, and its forward and backward pass."""

    def __init__(self, name: str, batch: int, classes: int, device: "torch.device | str" = "cpu") -> None:
        import torch

        from aroface.config.head import ArcFaceConfig
        from aroface.heads import build_head

        self.name = name
        config = ArcFaceConfig(
            kind="arcface",
            logit_scale=_SCALE,
            margin=_MARGIN,
            margin_gradient="straight_through",
            continuation="plain",
            **(OURS | FUSED).get(name, {}),
        )
        self.head = build_head(config, num_classes=classes, embedding_dim=DIM, seed=0).to(device)
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(batch, DIM, generator=generator).to(device).requires_grad_()
        self.labels = torch.randint(0, classes, (batch,), generator=generator).to(device)

    def __call__(self) -> float:
        """One pass; returns the loss and leaves the gradients."""
        import torch

        from launch.bench.head_peer import peer_loss, plain_loss

        weights = self.head.weight
        weights.grad = self.embeddings.grad = None
        if self.name in _PEERS:
            loss = peer_loss(self.embeddings, weights, self.labels, scale=_SCALE, margin=_MARGIN, **_PEERS[self.name])
        elif self.name == "plain":
            loss = plain_loss(self.embeddings, weights, self.labels, scale=_SCALE, margin=_MARGIN)
        else:
            loss = self.head(self.embeddings, self.labels, step=0)
        torch.autograd.backward([loss])
        return loss.item()

    def forget(self) -> None:
        """Drop the gradients: the next variant is not to find memory that this one could have kept from it."""
        self.head.weight.grad = self.embeddings.grad = None


def _agreement(report: Report, batch: int, classes: int) -> None:
    """Loss and gradients of ours beside arcface_torch's, as shares of the latter."""

    def outcome(name: str) -> tuple[float, "torch.Tensor", "torch.Tensor"]:
        work = Pass(name, batch, classes)
        loss = work()
        assert work.embeddings.grad is not None and work.head.weight.grad is not None  # noqa: S101, PT018
        return loss, work.embeddings.grad, work.head.weight.grad

    loss, *gradients = outcome("arcface_torch")
    for name, most in (("plain", 1e-5), ("chunked fp32", 1e-5), ("chunked bf16", None)):
        own, *others = outcome(name)
        report.add(f"{name}, loss off by", abs(own - loss) / loss, "of it", at_most=most)
        for what, mine, peer in zip(("embeddings", "centres"), others, gradients, strict=True):
            share = float((mine - peer).norm() / peer.norm())
            report.add(f"{name}, gradient of {what} off by", share, "of its norm", at_most=most)


def _times(report: Report, batch: int, classes: int, rounds: int) -> None:
    passes = {name: make() for name, make in _variants(batch, classes).items()}

    def work(one: Pass) -> int:
        one()
        one.forget()
        return batch

    found = interleave(
        {name: functools.partial(work, one) for name, one in passes.items()},
        rounds=rounds,
        on_round=lambda name, number: logger.info("%s, round %d", name, number),
    )
    by_name = {measurement.name: measurement for measurement in found}
    peaks = measure_peaks()
    for name, measurement in by_name.items():
        report.add(f"{name}, CPU time", measurement.cpu_s, "s", limit=_limit_s(name, batch, classes, peaks))
    goals = {"chunked fp32": 1.5, "chunked bf16": 2.5}
    for name in ("plain", *OURS):
        speed = ratio(by_name[name], by_name["arcface_torch"])
        report.add(f"{name}, speed of arcface_torch", speed, "x", at_least=goals.get(name))
    for rate in ("0.3", "0.1"):
        for suffix in ("", " bf16"):
            speed = ratio(by_name[f"sampled {rate}{suffix}"], by_name[f"arcface_torch {rate}"])
            report.add(f"sampled {rate}{suffix}, speed of arcface_torch sampled", speed, "x")
    report.details["times"] = {name: measured(measurement) for name, measurement in by_name.items()}


def _limit_s(name: str, batch: int, classes: int, peaks: Peaks) -> float:
    settings = {"sample_rate": 1.0, **OURS.get(name, _PEERS.get(name, {}))}
    flops = 6 * batch * classes * settings["sample_rate"] * DIM
    centres = 4 * classes * settings["sample_rate"] * DIM
    return peaks.limit_s(flops, 2 * centres, settings.get("logit_precision", "fp32"))


def _memory(report: Report, batch: int, classes: int) -> None:
    """Peak memory beyond the inputs; of it the gradient of the centres, which an optimiser needs."""
    gradient = 4 * classes * DIM
    extra = {}
    for name in _variants(batch, classes):
        whole = _in_process(_pass_memory, name, batch, classes)
        rate = OURS.get(name, _PEERS.get(name, {})).get("sample_rate", 1.0)
        # arcface_torch's sampling spreads the gradient over all centres again, ours stays with the sampled rows
        extra[name] = whole - (gradient if name in _PEERS else gradient * rate)
        report.add(f"{name}, memory over inputs", whole / 2**20, "MiB")
        report.add(f"{name}, of it without the gradient of the centres", extra[name] / 2**20, "MiB")
    for name in ("chunked fp32", "chunked bf16"):
        share = extra[name] / extra["arcface_torch"]
        report.add(f"{name}, memory without that gradient, of arcface_torch's", share, "", at_most=0.1)


def _full_size(report: Report) -> None:
    """One step with the optimiser at 617,970 classes; beyond centres, momentum and gradient it is the head's own."""
    need = 3 * 4 * _FULL_CLASSES * DIM
    for name in ("chunked fp32", "chunked bf16", "sampled 0.1 bf16"):
        for batch in (_FULL_BATCH, 2 * _FULL_BATCH) if name == "chunked bf16" else (_FULL_BATCH,):
            peak = _in_process(_step_memory, name, batch, _FULL_CLASSES)
            title = f"{name}, {batch:,} x {_FULL_CLASSES:,}"
            report.add(f"{title}, memory of a step", peak / 2**30, "GiB")
            if "sampled" not in name:
                report.add(f"{title}, over centres, momentum, gradient", (peak - need) / 2**20, "MiB")


def _exchanges(report: Report) -> None:
    """Collectives and bytes over two gloo processes; CurricularFace shares the target cosines too."""
    kinds = {"arcface": 3, "adaface": 3, "magface": 3, "curricularface": 4}
    for kind, (calls, size) in traffic(tuple(kinds), ranks=2, images=64).items():
        wanted = expected_bytes(kind, ranks=2, images=64)
        report.add(f"{kind}, collectives a step", calls, "", at_most=kinds[kind])
        report.add(f"{kind}, bytes of them, off the formula by", abs(size / wanted - 1), "", at_most=0.01)


def _in_process(work: Callable[[str, int, int], int], name: str, batch: int, classes: int) -> int:
    logger.info("memory of %s at %d x %d", name, batch, classes)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, name, batch, classes).result()


def _pass_memory(name: str, batch: int, classes: int) -> int:
    """Bytes beyond the inputs at the worst moment of a pass; a small one before it loads the libraries."""
    import torch

    torch.set_num_threads(1)
    Pass(name, 8, 64)()
    work = Pass(name, batch, classes)
    return peak_growth(work)


def _step_memory(name: str, batch: int, classes: int) -> int:
    """Bytes of centres, momentum, gradient and all else in one step, from before any of it exists."""
    import torch

    from aroface.heads import HeadSGD

    torch.set_num_threads(1)
    Pass(name, 8, 64)()

    def step() -> None:
        work = Pass(name, batch, classes)
        optimizer = HeadSGD(work.head, momentum=0.9, weight_decay=5e-4)
        work()
        optimizer.step(0.1)

    return peak_growth(step)
