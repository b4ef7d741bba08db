"""What the engine adds to a step: ours at each ZeRO stage against bare PyTorch DDP, on the same model and head.

The ranks are processes of this machine; every variant trains a copy of one network on one batch, in turns. DDP's step
is the shortest there is: forward, loss, backward, clip, two optimisers. Ours is the trainer's: the same through
DeepSpeed, with the checks on all ranks (loss and both gradients finite, somebody asked to stop). Above 1 a variant
costs more; DDP's step is the limit.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launch.bench.measure import Measurement, interleave
from launch.bench.output import Report, measured
from launch.evaluate_options import positive
from launch.outputs import output_file

if TYPE_CHECKING:
    import torch

    from aroface.config.schema import TrainConfig

_DDP = "DDP"
_CLASSES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="ranks, each a process of this machine")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 100), default=18, help="depth of the IResNet")
    parser.add_argument("--width", type=float, default=0.25, metavar="W", help="factor on its channels")
    parser.add_argument("--image-size", type=positive, default=56, metavar="PX", help="side of the images")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images per rank")
    parser.add_argument("--stages", type=_stages, default="0,1,2,3", metavar="S,..", help="ZeRO stages")
    parser.add_argument("--steps", type=positive, default=5, metavar="N", help="steps in a round")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="counted rounds")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def _stages(text: str) -> list[int]:
    parts = text.split(",")
    if not set(parts) <= {"0", "1", "2", "3"}:
        raise argparse.ArgumentTypeError(f"{text!r} names no ZeRO stages; write some of 0,1,2,3, such as 0,2")
    return [int(part) for part in parts]


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "entry")}
    settings |= {"classes": _CLASSES}
    report = Report("engine", ("torch", "deepspeed"), settings)
    found, parameters = _measure(settings)
    ddp = found[0]
    report.details["variants"] = {measurement.name: measured(measurement) for measurement in found}
    report.details["parameters"] = parameters
    report.add(f"{_DDP}, step, wall time", 1e3 * ddp.wall_s / ddp.items, "ms")
    report.add(f"{_DDP}, step, CPU time of rank 0", 1e3 * ddp.cpu_s / ddp.items, "ms")
    for one in found[1:]:
        pairs = list(zip(one.rounds, ddp.rounds, strict=True))
        report.add(f"{one.name} / {_DDP}, wall time", statistics.median(a[0] / b[0] for a, b in pairs), "x", limit=1.0)
        report.add(f"{one.name} / {_DDP}, CPU time", statistics.median(a[1] / b[1] for a, b in pairs), "x", limit=1.0)
        added = statistics.median((a[1] - b[1]) / one.items for a, b in pairs)
        report.add(f"{one.name}, added to a step, CPU time", 1e3 * added, "ms")
    report.write(args.out)
    return 0


def _measure(settings: dict[str, Any]) -> tuple[list[Measurement], int]:
    """Measurements of rank 0, DDP first, and the parameters of the network."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, settings, f"{folder}/store", results), daemon=True)
            for rank in range(settings["ranks"])
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        failed = [process.exitcode for process in ranks if process.exitcode]
        if failed:
            raise RuntimeError(f"A rank of the benchmark ended with exit code {failed[0]}; its message stands above.")
        found: tuple[list[Measurement], int] = results.get()
    return found


def _rank(rank: int, settings: dict[str, Any], store: str, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(settings["ranks"]), LOCAL_RANK=str(rank))
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    file_store = FileStore(store, settings["ranks"])
    distributed.init_process_group("gloo", store=file_store, rank=rank, world_size=settings["ranks"])
    torch.manual_seed(rank)
    size, batch = settings["image_size"], settings["batch_size"]
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, _CLASSES, (batch,))
    steps = {_DDP: _ddp_step(_config(settings, 0), rank, images, labels)}
    for stage in settings["stages"]:
        steps[f"ZeRO {stage}"] = _engine_step(_config(settings, stage), rank, images, labels)
    found = interleave(
        {name: _repeated(step, settings["steps"]) for name, step in steps.items()}, rounds=settings["rounds"]
    )
    if rank == 0:
        parameters = sum(p.numel() for p in _backbone(_config(settings, 0)).parameters())
        results.put((found, parameters))
    distributed.barrier()
    distributed.destroy_process_group()


def _repeated(step: Callable[[], None], count: int) -> Callable[[], int]:
    def work() -> int:
        for _ in range(count):
            step()
        return count

    return work


def _config(settings: dict[str, Any], stage: int) -> "TrainConfig":
    from aroface.config.schema import TrainConfig

    model = {"kind": "iresnet", "depth": settings["depth"], "width": settings["width"], "embedding_dim": 256}
    return TrainConfig.model_validate(
        {
            "seed": 0,
            "model": {**model, "image_size": settings["image_size"]},
            "head": {"kind": "arcface", "margin": 0.5},
            "alignment": {"kind": "none"},
            "data": {"shards": "none", "colour_order": "rgb"},
            "batch": {"global_batch": settings["batch_size"] * settings["ranks"]},
            "optim": {"clip_norm": 5.0},
            "schedule": {"epochs": 1.0},
            "engine": {"zero_stage": stage, "precision": "fp32"},
        }
    )


def _backbone(config: "TrainConfig") -> "torch.nn.Module":
    import torch

    from aroface.models import build_backbone

    torch.manual_seed(0)
    return build_backbone(config.model)


def _ddp_step(config: "TrainConfig", rank: int, images: "torch.Tensor", labels: "torch.Tensor") -> Callable[[], None]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from aroface.distributed import world_size
    from aroface.heads import HeadSGD, build_head

    backbone = DistributedDataParallel(_backbone(config), broadcast_buffers=False)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    head = build_head(config.head, num_classes=_CLASSES, embedding_dim=256, seed=0, rank=rank, world_size=world_size())
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4)
    centres = HeadSGD(head, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        head(backbone(images), labels, step=0).backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        centres.step(0.01)

    return step


def _engine_step(
    config: "TrainConfig", rank: int, images: "torch.Tensor", labels: "torch.Tensor"
) -> Callable[[], None]:
    from aroface.distributed import any_rank_each, world_size
    from aroface.engine.deepspeed_engine import BackboneEngine
    from aroface.engine.joint_update import JointUpdate
    from aroface.heads import HeadSGD, build_head

    engine = BackboneEngine(_backbone(config), config, world_size())
    head = build_head(config.head, num_classes=_CLASSES, embedding_dim=256, seed=0, rank=rank, world_size=world_size())
    update = JointUpdate(engine, head, HeadSGD(head, momentum=0.9, weight_decay=5e-4), config.optim, engine.scaler)
    engine.train()

    def step() -> None:
        loss = head(engine(images), labels, step=0)
        engine.backward(loss)
        update(loss.detach()[None], 0.01)
        any_rank_each([False, False])

    return step
