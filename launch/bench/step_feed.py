"""What a step waits for besides its own work: images, the way to the device, other ranks."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from aroface.config import TrainConfig
    from aroface.types import Batch, TrainingData

__all__ = ["collectives_s", "copy_s", "drawn_shards", "fed_steps"]

_IDENTITIES, _IMAGES = 20, 10
_COPIES = 10


@contextmanager
def drawn_shards(config: "TrainConfig", *, classes: int) -> "Iterator[TrainingData]":
    """Drawn faces in shards, as `aroface synthesize` and `aroface pack` make them, opened as the trainer opens its own.

    Args:
        config: of the training; `data.shards` does not matter.
        classes: labels stay below.
    """
    from launch.training_data import open_training_data
    from shards.pack import PackOptions, pack
    from shards.synthetic import write_synthetic

    with tempfile.TemporaryDirectory(prefix="aroface-bench-") as folder:
        faces, shards = Path(folder) / "faces", Path(folder) / "shards"
        write_synthetic(faces, identities=min(classes, _IDENTITIES), images_per_identity=_IMAGES, seed=0)
        pack(faces, shards, PackOptions(), workers=1)
        data = config.data.model_copy(update={"shards": str(shards)})
        yield open_training_data(data, image_size=config.model.image_size)


def fed_steps(
    data: "TrainingData", step: "Callable[[Batch], object]", *, batch: int, steps: int, device: "torch.device"
) -> tuple[float, float]:
    """Seconds by the clock on the wall, per step: of the wait for a batch as the trainer waits, and in all.

    Args:
        data: what is read; its threads decode ahead while a step runs.
        step: trains on a batch and waits for the device.
        batch: images of a step.
        steps: counted, after one that is not.
        device: where the step runs; a GPU gets its batches one step ahead.
    """
    from aroface.engine.prefetch import on_device

    count = steps + 1
    stream = data.batches(seed=0, start_position=0, num_batches=count, batch_size=batch, rank=0, world_size=1)
    batches = on_device(stream, device)
    step(next(batches))
    waited, begun = 0.0, time.perf_counter()
    for _ in range(steps):
        started = time.perf_counter()
        found = next(batches)
        waited += time.perf_counter() - started
        step(found)
    return waited / steps, (time.perf_counter() - begun) / steps


def copy_s(batch: "Batch", device: "torch.device") -> float:
    """Seconds that the images of a batch take from pinned memory to a GPU; the trainer hides them behind a step."""
    import torch

    pinned = batch.images.cpu().pin_memory()
    pinned.to(device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_COPIES):
        pinned.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / _COPIES


def collectives_s(step: Callable[[], object]) -> float:
    """Seconds of the host in collectives in one step, as PyTorch's profiler sees them.

    One rank has nobody to tell anything; what is left is calls of the engine that return at once.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    times = [event.cpu_time_total for event in found.key_averages() if event.key.startswith("c10d::")]
    return float(sum(times)) / 1e6
