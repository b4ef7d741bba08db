"""From searches of a calibration set to thresholds, by the canonical rule: no interpolation, ties included."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery.records import Calibration, Candidate, Level
from retrieval.metrics.rules import accepts, operating_point

__all__ = ["calibrated"]


def calibrated(
    found: Sequence[Sequence[Candidate]],
    subjects: NDArray[Any],
    enrolled: NDArray[np.bool_],
    probes: EmbeddingSet,
    fpirs: Sequence[float],
    level: Level,
    count: int,
) -> tuple[Calibration, ...]:
    """Thresholds for the wanted rates, the lowest rate first.

    Args:
        found: first candidates of every probe that has an embedding.
        subjects: (n,) who those probes are, as text.
        enrolled: (n,) whether they are in the gallery.
        probes: the whole set; a stranger without an embedding raises no alarm, a mate without one is a miss.
        fpirs: wanted rates.
        level: of the searches.
        count: entries in the gallery.

    Raises:
        DataError: a rate out of range, or no stranger with an embedding.
    """
    for fpir in fpirs:
        if not 0 < fpir < 1:
            raise DataError(f"FPIR {fpir} is outside (0, 1); 0.01 accepts one stranger in a hundred.")
    if not fpirs or enrolled.all():
        raise DataError(
            f"{probes.name}: a threshold needs rates, and searches for people who are not enrolled; all "
            f"{len(subjects)} usable probes are of enrolled subjects. Add faces of other people."
        )
    scores = np.array([near[0].score if near else -np.inf for near in found], np.float32)
    is_first = np.array([bool(near) and near[0].subject_id == who for near, who in zip(found, subjects, strict=True)])
    strangers = scores[~enrolled]
    mated = int(enrolled.sum())
    points = []
    for fpir in sorted(fpirs):
        point = operating_point(strangers, fpir)
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
