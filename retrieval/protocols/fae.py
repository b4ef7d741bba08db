"""FAE-1: how accuracy falls as the probes lose their alignment. To be compared only with itself.

References stay as they are (or are misaligned too, each image by its own draw). Probes are turned, shifted, scaled, all
of it at once, or aligned by wrong landmarks, each warped once from its source. Two policies for the threshold: set anew
for the wanted rate of false matches at every severity, as benchmarks do, and that of the clean probes kept, as a
deployed system does; the second shows what the first hides, namely that misalignment moves the scores of impostors too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.types import Embedder, FaceSet
from retrieval.degrade import ALIGNED, Misalignment, nme
from retrieval.embeddings import EmbeddingSet, concatenate
from retrieval.extraction import FlipMode, embed_face_set
from retrieval.metrics import OperatingPoint, operating_point, search_gallery, wilson
from retrieval.metrics.all_pairs import MOST_COMPARISONS, compare_all
from retrieval.metrics.rules import MIN_SUPPORTED, accepts
from retrieval.metrics.verification import pair_scores
from retrieval.protocols.fae_sets import FaeSet, of_faces
from retrieval.protocols.fae_sweeps import SWEEPS, TASK, Side, Sides, Sweep, WarpedFaces, drawn_error, points_in_crop
from retrieval.protocols.lfw_pairs import fold_accuracy
from retrieval.results import metric, preprocessing, result_record
from retrieval.templates import TemplateSamples, pool_templates

__all__ = ["SWEEPS", "FaeSettings", "Sides", "Sweep", "evaluate_fae", "evaluate_fae_set", "num_forward_images"]

#: Version 2: the name of the set enters every draw, and references have draws of their own.
_VERSION = 2
_CHUNK = 4096
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class FaeSettings:
    """What is evaluated."""

    subset: int | None = 500  #: probes, chosen by the hash of their key; None takes all
    trials: int = 3  #: draws of the random sweeps
    sides: Sides = "probe"  #: whose alignment is wrong
    far: str = "1e-2"  #: wanted rate of false matches, as it is written in the names of metrics
    fpir: str = "0.1"  #: wanted rate of false alarms, where there are searches of strangers
    flip: FlipMode = "sum"
    batch_size: int = 64


@dataclass(frozen=True)
class _Scores:
    """One state of the probes against one of the references."""

    genuine: NDArray[np.float32]
    impostor: NDArray[np.float32]
    rank_1: float | None = None
    num_mated: int = 0
    accuracy: float | None = None
    mated: NDArray[np.float32] | None = None  #: best scores of mated searches, -inf where the mate is not first
    strangers: NDArray[np.float32] | None = None  #: best scores of non-mated searches


@dataclass(frozen=True)
class _Frozen:
    """Thresholds of the clean probes."""

    pairs: OperatingPoint
    searches: OperatingPoint | None


def num_forward_images(faces: FaceSet | FaeSet, settings: FaeSettings) -> int:
    """Images that the model embeds (mirror images not counted), for a progress bar."""
    data_set = (faces if isinstance(faces, FaeSet) else of_faces(faces)).with_probes(settings.subset)
    passes = sum((len(sweep.levels) - 1) * (settings.trials if sweep.is_random else 1) for sweep in SWEEPS)
    probes, references = len(data_set.probes.keys), len(data_set.references.keys)
    return probes + references + passes * (probes + (references if settings.sides == "both" else 0))


def evaluate_fae(
    embedder: Embedder, faces: FaceSet, settings: FaeSettings, *, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    """All sweeps with one model, on aligned crops grouped by identity; see `evaluate_fae_set`."""
    return evaluate_fae_set(embedder, faces, of_faces(faces), settings, on_progress=on_progress)


def evaluate_fae_set(
    embedder: Embedder,
    faces: FaceSet,
    data_set: FaeSet,
    settings: FaeSettings,
    *,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """All sweeps with one model.

    Args:
        embedder: the model.
        faces: the sources of the images that the set names.
        data_set: what is compared.
        settings: how many probes and trials, and which rates.
        on_progress: called with the number of images embedded so far.

    Returns:
        A result record; `sweeps` holds {name, unit, points: [{severity, nme, metrics: {name: mean}, sd: {name: sd},
        difference: {name: mean - clean}}]}; nme is the mean over all drawn errors, sd that between trials (null where
        there is one).

    Raises:
        DataError: nothing to compare, or images that cannot be read.
    """
    data_set = data_set.with_probes(settings.subset)
    runner = _Runner(embedder, faces, data_set, settings, on_progress)
    references, probes = runner.embed("reference"), runner.embed("probe")
    clean = runner.score(references, probes)
    frozen = _Frozen(
        operating_point(clean.impostor, float(settings.far)),
        None if clean.strangers is None else operating_point(clean.strangers, float(settings.fpir)),
    )
    clean_metrics = _measure(clean, frozen, settings)
    sweeps = [
        {"name": sweep.name, "unit": sweep.unit, "points": runner.points(sweep, references, frozen, clean_metrics)}
        for sweep in SWEEPS
    ]
    counts = {"probes": len(probes), "gallery": len(references), "genuine": len(clean.genuine)}
    counts |= {"impostor": len(clean.impostor), "trials": settings.trials}
    counts |= {"fte_probes": int((~probes.enrolled).sum()), "fte_gallery": int((~references.enrolled).sum())}
    prepared, warnings = preprocessing(references.metadata)
    if frozen.pairs.k < MIN_SUPPORTED:
        warnings.append(f"FAR {settings.far}: fewer than {MIN_SUPPORTED} false matches stand behind the threshold.")
    return result_record(
        TASK,
        "canonical",
        counts=counts,
        metrics=_summary(clean_metrics, clean, frozen, sweeps, settings),
        warnings=warnings,
        version=_VERSION,
        sweeps=sweeps,
        set=data_set.name,
        pooling=str(data_set.pooling),
        model=dict(references.metadata),
        preprocessing=prepared,
        settings={"version": _VERSION, "subset": settings.subset, "trials": settings.trials, "flip": settings.flip}
        | {"sides": settings.sides, "far": settings.far, "fpir": settings.fpir},
    )


@dataclass(frozen=True)
class _Moved:
    references: EmbeddingSet
    probes: EmbeddingSet
    errors: list[float]  #: NME of every drawn error


class _Runner:
    """One model on one set."""

    def __init__(
        self,
        embedder: Embedder,
        faces: FaceSet,
        data_set: FaeSet,
        settings: FaeSettings,
        on_progress: Callable[[int], None],
    ) -> None:
        self._embedder, self._set, self._settings = embedder, data_set, settings
        self._faces = _Cached(faces)
        self._place = {key: place for place, key in enumerate(faces.keys)}
        self._on_progress, self._done = on_progress, 0

    def _samples(self, side: Side) -> TemplateSamples:
        return self._set.probes if side == "probe" else self._set.references

    def embed(self, side: Side, errors: Sequence[Misalignment] | None = None) -> EmbeddingSet:
        """Templates of one side, each sample with its error; None: aligned."""
        samples = self._samples(side)
        chunks = self._chunks(samples, errors or [ALIGNED] * len(samples.keys))
        return pool_templates(samples, chunks, self._set.pooling, name=f"{self._set.name}, {side}s")

    def _chunks(
        self, samples: TemplateSamples, errors: Sequence[Misalignment]
    ) -> Iterator[tuple[NDArray[np.int64], EmbeddingSet]]:
        order = samples.stream_order()
        for start in range(0, len(order), _CHUNK):
            rows = order[start : start + _CHUNK]
            names = samples.keys[rows].tolist()
            chosen = WarpedFaces(
                self._faces,
                names,
                [self._place.get(name, -1) for name in names],
                None if samples.landmarks is None else samples.landmarks[rows],
                [errors[row] for row in rows.tolist()],
            )
            found = embed_face_set(
                self._embedder,
                chosen,
                flip=self._settings.flip,
                batch_size=self._settings.batch_size,
                on_progress=lambda count: self._on_progress(self._done + count),
                may_all_fail=True,
                metadata={} if samples.landmarks is None else {"aligned_by": "the protocol's landmarks"},
            )
            self._done += len(rows)
            yield rows, found.embeddings

    def points(
        self, sweep: Sweep, references: EmbeddingSet, frozen: _Frozen, clean: dict[str, float]
    ) -> list[dict[str, Any]]:
        """Every level of a sweep."""
        points = []
        for level in sweep.levels:
            if level == sweep.clean_level:
                points.append(_point(level, [clean], [0.0], clean))
                continue
            trials: list[dict[str, float]] = []
            errors: list[float] = []
            for trial in range(self._settings.trials if sweep.is_random else 1):
                moved = self.moved(sweep, level, trial, references)
                trials.append(_measure(self.score(moved.references, moved.probes), frozen, self._settings))
                errors.extend(moved.errors)
            points.append(_point(level, trials, errors, clean))
        return points

    def moved(self, sweep: Sweep, level: float, trial: int, references: EmbeddingSet) -> _Moved:
        """Both sides at one level of a sweep."""
        errors, spread = self._draw(sweep, level, trial, "probe")
        if self._settings.sides == "both":
            own, more = self._draw(sweep, level, trial, "reference")
            references, spread = self.embed("reference", own), spread + more
        return _Moved(references, self.embed("probe", errors), spread)

    def _draw(self, sweep: Sweep, level: float, trial: int, side: Side) -> tuple[list[Misalignment], list[float]]:
        samples = self._samples(side)
        errors, distances = [], []
        for row, key in enumerate(samples.keys.tolist()):
            points = points_in_crop(None if samples.landmarks is None else samples.landmarks[row])
            error = drawn_error(sweep, level, data_set=self._set.name, key=key, trial=trial, side=side, points=points)
            errors.append(error)
            distances.append(nme(error, points))
        return errors, distances

    def score(self, references: EmbeddingSet, probes: EmbeddingSet) -> _Scores:
        """Compare what the set compares; the strangers of two galleries are taken together, under one threshold."""
        if self._set.pairs is not None:
            first, second, same = self._set.pairs
            both = concatenate([references, probes])
            scores = pair_scores(both, first, len(references) + second)
            accuracy, _ = fold_accuracy(scores, same)
            return _Scores(scores[same], scores[~same], accuracy=None if accuracy is None else accuracy.mean)
        searches = [search_gallery(references.take(rows), probes) for rows in self._set.galleries]
        rank = np.concatenate([s.rank[s.is_mated] for s in searches])
        best = np.concatenate([s.mated_best for s in searches])
        strangers = np.concatenate([s.non_mated_best for s in searches])
        compared = compare_all(references.take(_most(references, probes)), probes)
        return _Scores(
            compared.scores[compared.same],
            compared.scores[~compared.same],
            rank_1=float((rank <= 1).mean()) if len(rank) else None,
            num_mated=len(rank),
            mated=np.where(rank <= 1, best, np.float32(-np.inf)) if len(strangers) else None,
            strangers=strangers if len(strangers) else None,
        )


class _Cached:
    """Decoded images are kept, up to a limit: every severity reads the same sources."""

    def __init__(self, faces: FaceSet) -> None:
        self._faces, self._kept, self._bytes = faces, dict[int, NDArray[np.uint8]](), 0
        self.keys, self.identities = faces.keys, faces.identities

    def read(self, index: int) -> NDArray[np.uint8]:
        if (found := self._kept.get(index)) is not None:
            return found
        pixels = self._faces.read(index)
        if self._bytes + pixels.nbytes <= _CACHE_BYTES:
            self._kept[index] = pixels
            self._bytes += pixels.nbytes
        return pixels


def _most(references: EmbeddingSet, probes: EmbeddingSet) -> NDArray[np.int64]:
    """Entries to compare one by one: all of them, or the mates and others at even distances where they are too many."""
    budget = MOST_COMPARISONS // max(1, len(probes))
    if len(references) <= budget:
        return np.arange(len(references))
    mates = np.isin(references.subject_ids, probes.subject_ids)
    others = np.flatnonzero(~mates)
    step = max(1, -(-len(others) // max(1, budget - int(mates.sum()))))
    return np.sort(np.concatenate([np.flatnonzero(mates), others[::step]]))


def _measure(scores: _Scores, frozen: _Frozen, settings: FaeSettings) -> dict[str, float]:
    own = operating_point(scores.impostor, float(settings.far))
    found = {} if scores.rank_1 is None else {"rank_1": scores.rank_1}
    if scores.accuracy is not None:
        found["accuracy"] = scores.accuracy
    found[f"tar@far={settings.far}"] = float(accepts(scores.genuine, own).mean())
    if scores.mated is not None and scores.strangers is not None and frozen.searches is not None:
        alarm = operating_point(scores.strangers, float(settings.fpir))
        found[f"tpir@fpir={settings.fpir}"] = float(accepts(scores.mated, alarm).mean())
        found["fnir_frozen"] = 1.0 - float(accepts(scores.mated, frozen.searches).mean())
        found["fpir_frozen"] = float(accepts(scores.strangers, frozen.searches).mean())
    found["fnmr_frozen"] = 1.0 - float(accepts(scores.genuine, frozen.pairs).mean())
    found["fmr_frozen"] = float(accepts(scores.impostor, frozen.pairs).mean())
    return found


def _point(
    level: float, trials: Sequence[Mapping[str, float]], errors: Sequence[float], clean: Mapping[str, float]
) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    spread: dict[str, float | None] = {}
    for name in clean:
        values = [trial[name] for trial in trials]
        metrics[name] = float(np.mean(values))
        spread[name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "severity": float(level),
        "nme": float(np.mean(errors)),
        "metrics": metrics,
        "sd": spread,
        "difference": {name: value - clean[name] for name, value in metrics.items()},
    }


def _summary(
    clean: Mapping[str, float],
    scores: _Scores,
    frozen: _Frozen,
    sweeps: Sequence[Mapping[str, Any]],
    settings: FaeSettings,
) -> dict[str, Any]:
    """Clean values with Wilson intervals, and the area under each sweep."""
    shown = [name for name in clean if not name.endswith("_frozen")]
    searches = scores.num_mated
    trials = {"tar": len(scores.genuine), "accuracy": len(scores.genuine) + len(scores.impostor)}
    counts = {name: trials.get(name.partition("@")[0], searches) for name in shown}
    metrics = {
        name: metric(clean[name], interval=wilson(round(clean[name] * counts[name]), counts[name])) for name in shown
    }
    for name, point in ((f"tar@far={settings.far}", frozen.pairs), (f"tpir@fpir={settings.fpir}", frozen.searches)):
        if point is not None:
            threshold = point.threshold if np.isfinite(point.threshold) else None
            metrics[name] |= {"k": point.k, "realised": point.realised, "threshold": threshold}
            metrics[name] |= {"supported": point.k >= MIN_SUPPORTED}
    for sweep in sweeps:
        for name in shown:
            metrics[f"area_{name}@{sweep['name']}"] = metric(_area(sweep["points"], name))
    return metrics


def _area(points: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean of the metric over the levels, by trapezoids: 1 where nothing is ever missed."""
    levels = np.array([point["severity"] for point in points])
    values = np.array([point["metrics"][name] for point in points])
    return float(np.trapezoid(values, levels) / (levels[-1] - levels[0]))
