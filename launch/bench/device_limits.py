"""What a GPU reaches at most, measured: bytes that a copy moves, operations of a large product."""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["copy_rate", "product_rate", "seconds", "synchronise"]

_WARM_UP, _REPEATS = 3, 10


def copy_rate(device: "torch.device", size_bytes: int = 1 << 32) -> float:
    """Bytes per second of a copy on the device, those read and those written."""
    import torch

    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / seconds(lambda: target.copy_(source), device)


def product_rate(device: "torch.device", size: int = 8192) -> float:
    """Operations per second of a square bf16 product; of random factors, for zeros would be faster."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device)


def seconds(work: Callable[[], object], device: "torch.device") -> float:
    """Median wall time of one call, the device waited for."""
    times = []
    for number in range(_WARM_UP + _REPEATS):
        start = time.perf_counter()
        work()
        synchronise(device)
        if number >= _WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronise(device: "torch.device") -> None:
    """Wait for the device, if it is a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
