"""A plan as text and as numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from aroface.config import TrainConfig
from launch.plan.advice import fewest_gpus, remedies
from launch.plan.backbone import BackboneCounts, count_backbone
from launch.plan.budget import Plan, plan
from launch.plan.hardware import Efficiency, Gpu
from launch.plan.workload import Workload, workload_of

__all__ = ["GRID_CLASSES", "GRID_GPUS", "Page", "grid_page", "plan_page"]

GRID_CLASSES = (200_000, 617_970, 2_000_000, 10_000_000, 30_000_000, 100_000_000)
GRID_GPUS = (1, 8, 64, 512)
_GIB = 2**30
_MEMORY_WORDS = {
    "backbone_weights": "backbone: weights",
    "backbone_optimizer": "backbone: momentum and masters",
    "backbone_gradients": "backbone: gradients",
    "buckets": "gradients on their way",
    "activations": "activations",
    "head_state": "class centres and momentum",
    "head_gradient": "gradient of the centres",
    "head_chunk": "logits, a chunk at a time",
}
_TIME_WORDS = {
    "backbone": "backbone, attack included",
    "head": "head",
    "backbone_exchange": "exchange of the backbone",
    "head_exchange": "exchange of the head",
}


@dataclass(frozen=True)
class Page:
    """What is printed, and the same for machines."""

    text: str
    numbers: dict[str, Any]
    fits: bool


def plan_page(
    config: TrainConfig, *, gpus: int, gpu: Gpu, classes: int, images: int | None, efficiency: Efficiency
) -> Page:
    """The budget of one configuration."""
    counts = count_backbone(config.model, precision=config.engine.precision)
    work = workload_of(config, counts, gpus=gpus, classes=classes)
    result = plan(work, gpu, efficiency)
    lines = [*_heading(config, work, gpu), "", *_memory_lines(result, gpu), "", *_exchange_lines(work, result)]
    lines += ["", *_time_lines(work, result, images, config), "", *_choices(work, gpu, efficiency)]
    fixes: list[tuple[str, Plan]] = []
    if not result.fits:
        fixes = remedies(work, gpu, efficiency, checkpointed=_checkpointed(config))
        lines += ["", *_warning(work, result, fixes, fewest_gpus(work, gpu, efficiency), gpu)]
    lines += ["", *_assumptions(gpu, efficiency)]
    numbers = {
        **_numbers(work, result),
        "gpu": asdict(gpu),
        "assumptions": asdict(efficiency),
        "remedies": [name for name, _ in fixes],
    }
    return Page("\n".join(lines), numbers, result.fits)


def _checkpointed(config: TrainConfig) -> BackboneCounts | None:
    if getattr(config.model, "checkpoint_activations", True):
        return None
    model = config.model.model_copy(update={"checkpoint_activations": True})
    return count_backbone(model, precision=config.engine.precision)


def _numbers(work: Workload, result: Plan) -> dict[str, Any]:
    exchanges = (*result.communication.backbone, *result.communication.head)
    return {
        "workload": asdict(work),
        "global_batch": work.global_batch,
        "memory_bytes": {**asdict(result.memory), "total": result.memory.total, "usable": result.usable_bytes},
        "fits": result.fits,
        "sent_bytes": {exchange.what: exchange.sent(work.gpus) for exchange in exchanges},
        "step_s": {**asdict(result.time), "total": result.time.total},
        "img_per_s": work.global_batch / result.time.total,
    }


def _heading(config: TrainConfig, work: Workload, gpu: Gpu) -> list[str]:
    counts = work.backbone
    name = f"{config.model.kind}-{getattr(config.model, 'depth', '')}".rstrip("-")
    return [
        f"{name}: {counts.parameters / 1e6:.2f} M parameters, {counts.forward_flop / 1e9:.2f} GFLOP and "
        f"{counts.activation_bytes / 1e6:.1f} MB of activations per image ({work.precision})",
        f"{config.head.kind}: {work.classes:,} classes, {work.local_classes:,} on each GPU, "
        f"{work.sampled_classes:,} of them in a step",
        f"{work.gpus} x {gpu.name}: micro-batch {work.micro_batch} x accumulation {work.accumulation} x {work.gpus} "
        f"ranks = global batch {work.global_batch:,}; ZeRO stage {work.zero_stage}",
    ]


def _memory_lines(result: Plan, gpu: Gpu) -> list[str]:
    rows = [(_MEMORY_WORDS[name], value) for name, value in asdict(result.memory).items()]
    lines = ["Memory of a GPU, GiB"] + [f"  {what:<34}{value / _GIB:>10.2f}" for what, value in rows]
    verdict = "fits" if result.fits else "DOES NOT FIT"
    usable = f"of {result.usable_bytes / _GIB:.1f} usable: {verdict}"
    return [*lines, f"  {'total':<34}{result.memory.total / _GIB:>10.2f}  {usable}"]


def _exchange_lines(work: Workload, result: Plan) -> list[str]:
    exchanges = (*result.communication.backbone, *result.communication.head)
    return ["Sent by a GPU in a step, MB"] + [
        f"  {f'{exchange.what} ({exchange.kind})':<48}{exchange.sent(work.gpus) / 1e6:>10.2f}" for exchange in exchanges
    ]


def _time_lines(work: Workload, result: Plan, images: int | None, config: TrainConfig) -> list[str]:
    time = result.time
    lines = ["Time of a step, ms"]
    for name, value in asdict(time).items():
        lines.append(f"  {_TIME_WORDS[name]:<34}{1e3 * value:>10.2f}  {value / time.total:>6.1%}")
    rate = work.global_batch / time.total
    lines.append(f"  {'total':<34}{1e3 * time.total:>10.2f}  {rate:,.0f} img/s, {rate / work.gpus:,.0f} a GPU")
    if images is not None:
        epochs = config.schedule.epochs
        hours = epochs * images / rate / 3600
        cost = f"{hours:,.1f} h, {hours * work.gpus:,.0f} GPU hours"
        lines.append(f"  {epochs:g} epochs of {images:,} images: {cost}")
    return lines


def _choices(work: Workload, gpu: Gpu, efficiency: Efficiency) -> list[str]:
    """The same with other ZeRO stages and sample rates."""
    lines = ["Other choices                          GiB    ms/step  sent MB"]
    options = [(f"engine.zero_stage={stage}", replace(work, zero_stage=stage)) for stage in range(4)]
    options += [(f"head.sample_rate={rate}", replace(work, sample_rate=rate)) for rate in (1.0, 0.3, 0.1)]
    for name, changed in options:
        other = plan(changed, gpu, efficiency)
        sent = sum(exchange.sent(work.gpus) for exchange in other.communication.backbone)
        mark = "  <- this" if changed == work else ""
        lines.append(
            f"  {name:<32}{other.memory.total / _GIB:>9.2f}{1e3 * other.time.total:>11.2f}{sent / 1e6:>9.1f}{mark}"
        )
    return lines


def _warning(work: Workload, result: Plan, fixes: Sequence[tuple[str, Plan]], gpus: int | None, gpu: Gpu) -> list[str]:
    parts = asdict(result.memory)
    largest = max(parts, key=lambda name: parts[name])
    lines = [
        f"This does not fit: {result.memory.total / _GIB:.1f} GiB on a GPU with {result.usable_bytes / _GIB:.1f} "
        f"usable. The largest part: {_MEMORY_WORDS[largest]}, {parts[largest] / _GIB:.1f} GiB."
    ]
    for name, other in fixes:
        slower = other.time.total / result.time.total
        lines.append(f"  set {name}: {other.memory.total / _GIB:.1f} GiB, {slower:.2f}x the time of a step")
    if gpus is None:
        lines.append(f"  more GPUs at {work.micro_batch} images each do not help.")
    else:
        lines.append(
            f"  or {gpus} x {gpu.name} at {work.micro_batch} images each (batch.global_batch="
            f"{work.micro_batch * work.accumulation * gpus})"
        )
    return lines


def _assumptions(gpu: Gpu, efficiency: Efficiency) -> list[str]:
    return [
        "A model, not a measurement. Counted on the real network: parameters, arithmetic, activations. From data "
        f"sheets: {gpu.bf16_flop_per_s / 1e12:.0f} TFLOP/s bf16, {gpu.memory_bytes / 1e9:.0f} GB at "
        f"{gpu.memory_bytes_per_s / 1e12:.2f} TB/s, {gpu.node_bytes_per_s / 1e9:.0f} GB/s in a node of "
        f"{gpu.gpus_per_node}, {gpu.network_bytes_per_s / 1e9:.0f} GB/s between nodes.",
        f"Assumed: the backbone reaches {efficiency.backbone:.0%} of the peak, the head {efficiency.head:.0%}, the "
        f"memory {efficiency.memory:.0%}, links {efficiency.link:.0%}; {efficiency.overlap:.0%} of the gradient "
        f"exchange is hidden; {efficiency.usable_memory:.0%} of the memory can be used; loading images costs nothing.",
    ]


def grid_page(
    config: TrainConfig, *, gpus: int, gpu: Gpu, classes: int, images: int | None, efficiency: Efficiency
) -> Page:
    """Class counts against GPU counts, each GPU with as many images as the configuration gives it on `gpus`."""
    counts = count_backbone(config.model, precision=config.engine.precision)
    base = workload_of(config, counts, gpus=gpus, classes=classes)
    lines = [
        *_heading(config, base, gpu)[:1],
        f"{gpu.name}, {base.micro_batch} images a GPU, sample rate {base.sample_rate:g}, ZeRO stage {base.zero_stage}: "
        "GiB a GPU (! too much), ms a step, img/s a GPU",
        "",
        "| classes | " + " | ".join(f"{n} GPUs" for n in GRID_GPUS) + " |",
        "|---" * (1 + len(GRID_GPUS)) + "|",
    ]
    cells = []
    for number in GRID_CLASSES:
        row = []
        for n in GRID_GPUS:
            work = replace(base, classes=number, gpus=n, accumulation=1)
            result = plan(work, gpu, efficiency)
            cells.append(_numbers(work, result))
            mark = "" if result.fits else "!"
            rate = work.micro_batch / result.time.total
            row.append(f"{result.memory.total / _GIB:.1f}{mark}, {1e3 * result.time.total:.0f}, {rate:,.0f}")
        lines.append(f"| {number / 1e6:g} M | " + " | ".join(row) + " |")
    lines += ["", *_assumptions(gpu, efficiency)]
    numbers = {"cells": cells, "gpu": asdict(gpu), "assumptions": asdict(efficiency)}
    return Page("\n".join(lines), numbers, fits=True)
