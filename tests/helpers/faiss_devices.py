"""Indexes of the CPU in the place of those that Faiss has for GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest


def stand_in_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> set[int]:
    """Indexes of the CPU under the names that Faiss has for GPUs; returns the numbers of those that are used."""
    import faiss

    used: set[int] = set()

    def flat(resources: Any, dimension: int, config: SimpleNamespace) -> Any:
        used.add(config.device)
        return faiss.index_factory(dimension, "SQfp16" if config.useFloat16 else "Flat", faiss.METRIC_INNER_PRODUCT)

    def moved(resources: list[Any], index: Any, options: SimpleNamespace, devices: list[int]) -> Any:
        assert len(resources) == len(devices)
        assert options.shard
        used.update(devices)
        return faiss.clone_index(index)

    for name, value in {
        "get_num_gpus": lambda: count,
        "StandardGpuResources": object,
        "GpuIndexFlatConfig": SimpleNamespace,
        "GpuIndexFlatIP": flat,
        "GpuMultipleClonerOptions": SimpleNamespace,
        "index_cpu_to_gpu_multiple_py": moved,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    return used
