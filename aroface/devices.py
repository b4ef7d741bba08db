"""Which part of a machine belongs to this process. Imports torch only to count GPUs."""

import os

__all__ = ["local_rank", "local_ranks", "own_device", "own_gpu"]


def local_rank() -> int:
    """Number of this process among those that torchrun or srun started on this machine; 0 where it is the only one."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0")


def local_ranks() -> int:
    """Processes that torchrun, srun or DeepSpeed started on this machine; 1 where there is no launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def own_gpu() -> int | None:
    """Index of the GPU of the local rank, by turns where there are fewer GPUs than ranks; None without a GPU."""
    import torch

    return local_rank() % torch.cuda.device_count() if torch.cuda.is_available() else None


def own_device() -> str:
    """The same as PyTorch names it; `cpu` without a GPU."""
    gpu = own_gpu()
    return "cpu" if gpu is None else f"cuda:{gpu}"
