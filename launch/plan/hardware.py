"""The machines that a plan can be made for: figures of the makers' data sheets, and how much of them is reached.

Nothing here was measured by this project. Peaks are dense rates without sparsity; links count one direction.
"""

from dataclasses import dataclass

__all__ = ["GPUS", "Efficiency", "Gpu"]

_GIB = 2**30
_GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in one kind of node."""

    name: str
    memory_bytes: float
    bf16_flop_per_s: float
    fp32_flop_per_s: float  #: plain fp32, which fp32 products use unless TF32 is switched on
    memory_bytes_per_s: float
    node_bytes_per_s: float  #: between GPUs of a node, each
    network_bytes_per_s: float  #: between nodes, each GPU: one 400 Gb/s adapter a GPU, or 200 for A100
    gpus_per_node: int = 8


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40 * _GB, 312e12, 19.5e12, 1.555e12, 300 * _GB, 25 * _GB),
        Gpu("a100", 80 * _GB, 312e12, 19.5e12, 2.039e12, 300 * _GB, 25 * _GB),
        Gpu("h100", 80 * _GB, 989e12, 67e12, 3.35e12, 450 * _GB, 50 * _GB),
        Gpu("h200", 141 * _GB, 989e12, 67e12, 4.8e12, 450 * _GB, 50 * _GB),
        Gpu("b200", 180 * _GB, 2250e12, 75e12, 8.0e12, 900 * _GB, 50 * _GB),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that are assumed to be reached. Every time of a plan is proportional to one of these."""

    backbone: float = 0.25  #: of the peak, forward and backward pass; published trainers reach 0.1 to 0.28
    head: float = 0.6  #: of the peak, large matrix products
    memory: float = 0.8  #: of the memory's rate
    link: float = 0.7  #: of the links' rate
    overlap: float = 0.0  #: share of the gradient exchange that is hidden behind the backward pass
    usable_memory: float = 0.92  #: of the memory, next to the context of the driver and fragmentation
