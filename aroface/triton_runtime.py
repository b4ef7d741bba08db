"""What the Triton kernels of this project need to know of the machine that they run on."""

import functools
import os

import torch

__all__ = ["is_interpreted", "multiprocessors"]


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, one operation after the other: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a small number elsewhere, so that the interpreter shares out work too."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2
