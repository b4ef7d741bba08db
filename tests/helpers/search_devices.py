"""The CPU in the place of GPUs: its memory for exact searches, its indexes for those that Faiss has for GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrieval.gallery import on_gpu


def stand_in_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> set[int]:
    """So many devices that are the CPU; returns the numbers of those that are used."""
    import faiss

    used: set[int] = set()

    def device(number: int) -> torch.device:
        used.add(number)
        return torch.device("cpu")

    def moved(resources: list[Any], index: Any, options: SimpleNamespace, devices: list[int]) -> Any:
        assert len(resources) == len(devices)
        assert options.shard
        used.update(devices)
        return faiss.clone_index(index)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(on_gpu, "_device", device)
    for name, value in {
        "StandardGpuResources": object,
        "GpuMultipleClonerOptions": SimpleNamespace,
        "index_cpu_to_gpu_multiple_py": moved,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    return used
