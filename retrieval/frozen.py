"""Thresholds of one evaluation applied to another: what happens to a system whose threshold was set once.

Source: docs of the protocols, F: thresholds are set on one data set and applied elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.metrics.intervals import wilson
from retrieval.metrics.search import GallerySearch
from retrieval.results import metric

__all__ = ["frozen_identification", "frozen_verification"]


def frozen_verification(
    source: Mapping[str, Any], genuine: NDArray[Any], impostor: NDArray[Any]
) -> dict[str, dict[str, Any]]:
    """FNMR and FMR of listed pairs at every threshold that another evaluation of pairs has set.

    Args:
        source: its result record.
        genuine: (G,) scores here.
        impostor: (I,) scores here.

    Raises:
        DataError: the record holds no such threshold.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for label, threshold in _thresholds(source, "tar@"):
        accepted, false = int((genuine > threshold).sum()), int((impostor > threshold).sum())
        metrics[f"fnmr@frozen:{label}"] = _rate(len(genuine) - accepted, len(genuine), threshold)
        metrics[f"fmr@frozen:{label}"] = _rate(false, len(impostor), threshold)
    return metrics


def frozen_identification(source: Mapping[str, Any], searches: Sequence[GallerySearch]) -> dict[str, dict[str, Any]]:
    """FNIR (rank 1) and FPIR, pooled over galleries, at every threshold that another search of one gallery has set.

    Raises:
        DataError: the record holds no such threshold.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for label, threshold in _thresholds(source, "tpir@"):
        found = sum(int((s.is_mated & (s.rank <= 1) & (s.best > threshold)).sum()) for s in searches)
        alarms = sum(int((~s.is_mated & (s.best > threshold)).sum()) for s in searches)
        mated = sum(int(s.is_mated.sum()) for s in searches)
        strangers = sum(int((~s.is_mated).sum()) for s in searches)
        metrics[f"fnir@frozen:{label}"] = _rate(mated - found, mated, threshold)
        metrics[f"fpir@frozen:{label}"] = _rate(alarms, strangers, threshold)
    return metrics


def _thresholds(source: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    if source["rule"] != "canonical":
        raise DataError(
            f"--thresholds: the result of {source['protocol']} was made by the rule {source['rule']}, whose thresholds "
            "accept other scores; evaluate that set without --rule."
        )
    found = [
        (name.removeprefix(prefix), np.float32(entry["threshold"]).item())
        for name, entry in source["metrics"].items()
        if name.startswith(prefix) and entry.get("threshold") is not None
    ]
    if not found:
        raise DataError(
            f"--thresholds: the result of {source['protocol']} holds no threshold of {prefix.rstrip('@').upper()}; "
            "name one of the same kind, of one gallery."
        )
    return found


def _rate(count: int, total: int, threshold: float) -> dict[str, Any]:
    if not total:
        return metric(None, reason="nothing to count")
    return metric(count / total, interval=wilson(count, total), threshold=threshold, errors=count)
