"""FAE-1: how accuracy falls as the probes lose their alignment. To be compared only with itself.

Gallery: the first image of every identity, as it is (or misaligned too, each image by its own draw). Probes: other
images, turned, shifted, scaled, all of it at once, or aligned by wrong landmarks, warped once from the source. Two
policies for the threshold: re-calibrated to the wanted FAR at every severity, as benchmarks do, and that of the clean
probes kept, as a deployed system does; the second shows what the first hides, namely that misalignment moves the scores
of impostors too.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aroface.types import Embedder, FaceSet
from retrieval.degrade import (
    ALIGNED,
    Misalignment,
    generator_for,
    jitter_landmarks,
    misalign,
    nme,
    sample_misalignment,
)
from retrieval.embeddings import EmbeddingSet
from retrieval.extraction import FlipMode, Transform, embed_face_set
from retrieval.metrics import OperatingPoint, operating_point
from retrieval.metrics.rules import accepts
from retrieval.metrics.search import rank_scores
from retrieval.protocols.lfw_lq import split_faces
from retrieval.results import metric, result_record

__all__ = ["SWEEPS", "FaeSettings", "Sides", "Sweep", "evaluate_fae", "num_forward_images"]

#: probe: the gallery stays aligned. both: every image is misaligned by its own draw.
Sides = Literal["probe", "both"]

_TASK = "fae-1"
_FAR_LABEL = "1e-2"
_TAR = f"tar@far={_FAR_LABEL}"


@dataclass(frozen=True)
class Sweep:
    """One way to go wrong, by how much."""

    name: str
    unit: str
    levels: tuple[float, ...]
    clean_level: float  #: the level at which nothing happens
    is_random: bool  #: whether trials differ
    draw: Callable[[np.random.Generator, float], Misalignment]


def _shift(generator: np.random.Generator, length_px: float) -> Misalignment:
    direction = generator.uniform(0.0, 2.0 * np.pi)
    return Misalignment(shift_px=(length_px * float(np.cos(direction)), length_px * float(np.sin(direction))))


SWEEPS: tuple[Sweep, ...] = (
    Sweep(
        "angle", "deg", (-20, -15, -10, -5, -2, 0, 2, 5, 10, 15, 20), 0, False, lambda _, a: Misalignment(theta_deg=a)
    ),
    Sweep("shift", "px", (0, 1, 2, 4, 6, 8, 12), 0, True, _shift),
    Sweep("scale", "", (0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2), 1, False, lambda _, s: Misalignment(scale=s)),
    Sweep("severity", "", (0, 0.25, 0.5, 0.75, 1), 0, True, sample_misalignment),
    Sweep("landmarks", "eye distances", (0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.10, 0.15), 0, True, jitter_landmarks),
)


@dataclass(frozen=True)
class FaeSettings:
    """What is evaluated."""

    subset: int | None = 500  #: probes, chosen by the hash of their key; None takes all
    trials: int = 1  #: draws of the random sweeps
    sides: Sides = "probe"  #: whose alignment is wrong
    flip: FlipMode = "sum"
    batch_size: int = 64


@dataclass(frozen=True)
class _Scores:
    """Probes against the gallery."""

    rank_1: float
    genuine: NDArray[np.float32]
    impostor: NDArray[np.float32]


def num_forward_images(faces: FaceSet, settings: FaeSettings) -> int:
    """Images that the model embeds (mirror images not counted), for a progress bar."""
    gallery, probes = split_faces(faces)
    passes = sum((len(sweep.levels) - 1) * (settings.trials if sweep.is_random else 1) for sweep in SWEEPS)
    moved = len(_subset(faces, probes, settings.subset)) + (len(gallery) if settings.sides == "both" else 0)
    return len(gallery) + len(_subset(faces, probes, settings.subset)) + moved * passes


def evaluate_fae(
    embedder: Embedder, faces: FaceSet, settings: FaeSettings, *, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    """All sweeps with one model.

    Args:
        embedder: the model.
        faces: aligned crops.
        settings: how many probes and trials.
        on_progress: called with the number of images embedded so far.

    Returns:
        A result record; `sweeps` holds {name, unit, points: [{severity, nme, metrics: {name: mean}, sd: {name: sd}}]};
        nme is the mean over all drawn errors, sd that between trials (null where there is one).

    Raises:
        DataError: nobody to search for, or images that cannot be read.
    """
    gallery_rows, all_probes = split_faces(faces)
    probe_rows = _subset(faces, all_probes, settings.subset)
    done = 0

    def embed(rows: Sequence[int], transform: Transform | None = None) -> EmbeddingSet:
        nonlocal done
        found = embed_face_set(
            embedder,
            faces,
            indices=rows,
            transform=transform,
            flip=settings.flip,
            batch_size=settings.batch_size,
            on_progress=lambda count: on_progress(done + count),
        )
        done += len(rows)
        return found.embeddings

    gallery = embed(gallery_rows)
    clean = _score(gallery, embed(probe_rows))
    frozen = operating_point(clean.impostor, float(_FAR_LABEL))
    moved = [*probe_rows, *(gallery_rows if settings.sides == "both" else ())]
    keys = [faces.keys[row] for row in moved]
    sweeps = []
    for sweep in SWEEPS:
        points = []
        for level in sweep.levels:
            if level == sweep.clean_level:
                points.append(_point(level, [_measure(clean, frozen)], [0.0]))
                continue
            trials = []
            errors: list[float] = []
            for trial in range(settings.trials if sweep.is_random else 1):
                drawn = {key: _drawn(sweep, level, key, trial) for key in keys}
                enrolled = embed(gallery_rows, _warp(drawn)) if settings.sides == "both" else gallery
                trials.append(_measure(_score(enrolled, embed(probe_rows, _warp(drawn))), frozen))
                errors.extend(map(nme, drawn.values()))
            points.append(_point(level, trials, errors))
        sweeps.append({"name": sweep.name, "unit": sweep.unit, "points": points})
    return result_record(
        _TASK,
        "canonical",
        counts={"probes": len(probe_rows), "gallery": len(gallery_rows), "trials": settings.trials},
        metrics=_summary(clean, frozen, sweeps),
        sweeps=sweeps,
        model=dict(gallery.metadata),
        settings={"version": 1, "subset": settings.subset, "trials": settings.trials, "flip": settings.flip}
        | {"sides": settings.sides},
    )


def _subset(faces: FaceSet, probes: Sequence[int], most: int | None) -> list[int]:
    if most is None or most >= len(probes):
        return list(probes)
    return sorted(sorted(probes, key=lambda row: hashlib.sha256(faces.keys[row].encode()).digest())[:most])


def _drawn(sweep: Sweep, level: float, key: str, trial: int) -> Misalignment:
    """The same direction at every level of a sweep: levels differ in size alone."""
    return sweep.draw(generator_for(f"{_TASK}/{sweep.name}", key, trial), level)


def _warp(drawn: Mapping[str, Misalignment]) -> Transform:
    return lambda pixels, key: misalign(pixels, drawn.get(key, ALIGNED))


def _score(gallery: EmbeddingSet, probes: EmbeddingSet) -> _Scores:
    scores = (probes.unit() @ gallery.unit().T).astype(np.float32)
    scores[:, ~gallery.enrolled] = -np.inf
    scores[~probes.enrolled] = -np.inf
    ranks = rank_scores(scores, gallery.subject_ids, probes.subject_ids).rank
    same = probes.subject_ids[:, None] == gallery.subject_ids[None, :]
    return _Scores(float((ranks <= 1).mean()), scores[same], scores[~same])


def _measure(scores: _Scores, frozen: OperatingPoint) -> dict[str, float]:
    own = operating_point(scores.impostor, float(_FAR_LABEL))
    return {
        "rank_1": scores.rank_1,
        _TAR: float(accepts(scores.genuine, own).mean()),
        "fnmr_frozen": 1.0 - float(accepts(scores.genuine, frozen).mean()),
        "fmr_frozen": float(accepts(scores.impostor, frozen).mean()),
    }


def _point(level: float, trials: Sequence[Mapping[str, float]], errors: Sequence[float]) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    spread: dict[str, float | None] = {}
    for name in trials[0]:
        values = [trial[name] for trial in trials]
        metrics[name] = float(np.mean(values))
        spread[name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"severity": float(level), "nme": float(np.mean(errors)), "metrics": metrics, "sd": spread}


def _summary(clean: _Scores, frozen: OperatingPoint, sweeps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measured = _measure(clean, frozen)
    metrics = {"rank_1": metric(measured["rank_1"]), _TAR: metric(measured[_TAR])}
    metrics[_TAR] |= {"k": frozen.k, "realised": frozen.realised}
    for sweep in sweeps:
        for name in ("rank_1", _TAR):
            metrics[f"area_{name}@{sweep['name']}"] = metric(_area(sweep["points"], name))
    return metrics


def _area(points: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean of the metric over the levels, by trapezoids: 1 where nothing is ever missed."""
    levels = np.array([point["severity"] for point in points])
    values = np.array([point["metrics"][name] for point in points])
    return float(np.trapezoid(values, levels) / (levels[-1] - levels[0]))
