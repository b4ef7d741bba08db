"""From searches of a calibration set to thresholds, by the canonical rule: no interpolation, ties included."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.gallery.records import Calibration, Candidate, Level
from retrieval.metrics.rules import accepts, operating_point

__all__ = ["calibrated"]


def calibrated(
    found: Sequence[Sequence[Candidate]],
    subjects: NDArray[Any],
    enrolled: NDArray[np.bool_],
    fpirs: Sequence[float],
    level: Level,
    count: int,
    *,
    name: str,
) -> tuple[Calibration, ...]:
    """Thresholds for the wanted rates, the lowest rate first.

    Args:
        found: first candidates of every probe; none for one without an embedding. Such a stranger raises no alarm, such
            a mate is a miss, and both count.
        subjects: (n,) who the probes are, as text.
        enrolled: (n,) whether they are in the gallery.
        fpirs: wanted rates.
        level: of the searches.
        count: entries in the gallery.
        name: of the probes, for messages.

    Raises:
        DataError: a rate out of range, no stranger, or a rate that allows as many alarms as there are scores.

    Source: docs of the protocols, section 1.7.
    """
    for fpir in fpirs:
        if not 0 < fpir < 1:
            raise DataError(f"FPIR {fpir} is outside (0, 1); 0.01 accepts one stranger in a hundred.")
    if not fpirs or enrolled.all():
        raise DataError(
            f"{name}: a threshold needs rates, and searches for people who are not enrolled; all {len(subjects)} "
            "probes are of enrolled subjects. Add faces of other people."
        )
    scores = np.array([near[0].score if near else -np.inf for near in found], np.float32)
    is_first = np.array([bool(near) and near[0].subject_id == who for near, who in zip(found, subjects, strict=True)])
    strangers = scores[~enrolled]
    mated = int(enrolled.sum())
    points = []
    for fpir in sorted(fpirs):
        point = operating_point(strangers, fpir)
        if point.threshold == -np.inf:
            raise DataError(
                f"{name}: FPIR {fpir:g} allows {point.k} false alarms in {len(strangers)} searches for strangers, and "
                f"only {np.isfinite(strangers).sum()} of them found anybody: every score would be accepted. Ask for a "
                "lower rate, or add strangers whose faces have an embedding."
            )
        hits = int((accepts(scores, point) & is_first & enrolled).sum())
        points.append(
            Calibration(
                fpir=fpir,
                threshold=point.threshold,
                k=point.k,
                realised=point.realised,
                non_mated=len(strangers),
                mated=mated,
                tpir=hits / mated if mated else None,
                level=level,
                count=count,
            )
        )
    return tuple(points)
