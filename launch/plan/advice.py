"""Which settings to change when a configuration does not fit, and what other choices would cost."""

from collections.abc import Iterator
from dataclasses import replace

from launch.plan.backbone import BackboneCounts
from launch.plan.budget import Plan, plan
from launch.plan.hardware import Efficiency, Gpu
from launch.plan.workload import Workload

__all__ = ["fewest_gpus", "remedies"]

_MOST_GPUS = 4096


def remedies(
    work: Workload, gpu: Gpu, efficiency: Efficiency, *, checkpointed: BackboneCounts | None
) -> list[tuple[str, Plan]]:
    """Changes that make a workload fit: single ones if one is enough, else one way of combining them.

    Args:
        work: what does not fit.
        gpu: where.
        efficiency: assumed.
        checkpointed: counts of the backbone with `model.checkpoint_activations`; None: it is set already.

    Returns:
        Settings and the plan with them; empty when nothing but more GPUs helps.
    """
    changes = list(_changes(work, checkpointed))
    single = [(name, plan(changed, gpu, efficiency)) for name, changed in changes]
    fitting = [(name, result) for name, result in single if result.fits]
    if fitting:
        return fitting
    names: list[str] = []
    current = work
    while changes := list(_changes(current, checkpointed if current.backbone is work.backbone else None)):
        name, changed = min(changes, key=lambda change: plan(change[1], gpu, efficiency).memory.total)
        if plan(changed, gpu, efficiency).memory.total >= plan(current, gpu, efficiency).memory.total:
            break
        names = [old for old in names if old.split("=")[0] != name.split("=")[0]] + [name]
        current = changed
        if (result := plan(current, gpu, efficiency)).fits:
            return [(" ".join(names), result)]
    return []


def _changes(work: Workload, checkpointed: BackboneCounts | None) -> Iterator[tuple[str, Workload]]:
    if checkpointed is not None:
        yield "model.checkpoint_activations=true", replace(work, backbone=checkpointed)
    if work.micro_batch > 1 and work.micro_batch % 2 == 0:
        half = work.micro_batch // 2
        yield f"batch.micro_batch={half}", replace(work, micro_batch=half, accumulation=2 * work.accumulation)
    for stage in range(work.zero_stage + 1, 4):
        yield f"engine.zero_stage={stage}", replace(work, zero_stage=stage)
    if work.zero_stage > 0 and work.bucket_numbers > 50_000_000:
        name = "engine.deepspeed_extra.zero_optimization.reduce_bucket_size=50000000"
        yield name, replace(work, bucket_numbers=50_000_000)
    if work.chunk > 1024:
        yield "head.chunk_classes=1024", replace(work, chunk_classes=1024)
    for rate in (0.3, 0.1):
        if work.sample_rate > rate:
            yield f"head.sample_rate={rate}", replace(work, sample_rate=rate)


def fewest_gpus(work: Workload, gpu: Gpu, efficiency: Efficiency) -> int | None:
    """The smallest doubling of the GPUs, at the same images a GPU, with which it fits; None: not even 4096."""
    gpus = work.gpus
    while gpus <= _MOST_GPUS:
        if plan(replace(work, gpus=gpus), gpu, efficiency).fits:
            return gpus
        gpus *= 2
    return None
