"""`FaceGallery`: what every gallery offers, wherever its embeddings lie."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.contract import InputContract
from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery.calibration import calibrated
from retrieval.gallery.records import Calibration, Candidate, Fusion, GalleryInfo, Level
from retrieval.gallery.search import Request, Source, search_source
from retrieval.gallery.vectors import as_unit, check_embeddings
from retrieval.templates import Pooling, TemplateSums

__all__ = ["FaceGallery"]


class FaceGallery(ABC):
    """Enrolled embeddings, compared by cosine.

    An entry has an id of its own and belongs to a subject; ids are kept as text. Embeddings may have any length; they
    are normalised. `model_id` and `contract` say which model made them: a gallery refuses those of another one.
    Changes return the new state and are durable when they return.
    """

    @property
    def info(self) -> GalleryInfo:
        """What the gallery holds."""
        return self._info(len(self))

    @abstractmethod
    def _info(self, count: int) -> GalleryInfo:
        """What the gallery holds, where `count` entries are known already or do not matter."""

    @abstractmethod
    def __len__(self) -> int:
        """Enrolled entries."""

    @abstractmethod
    def add(
        self,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        upsert: bool = False,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> Self:
        """Enrol (M, D) more embeddings.

        Args:
            embeddings: (M, D) of any length, finite and not zero.
            subject_ids: (M,) who each one is.
            entry_ids: (M,) unique; default: free numbers.
            upsert: an entry id that is enrolled already is replaced; otherwise it is an error.
            model_id: model of the embeddings.
            contract: its input contract.

        Raises:
            DataError: no direction, ids that repeat or are taken, another dimension, model or contract; nothing is
                enrolled then.
            ShapeError: arrays that do not fit together.
        """

    @abstractmethod
    def remove(self, *, entry_ids: Collection[str] = (), subject_ids: Collection[str] = ()) -> Self:
        """Remove entries by their id, and all entries of subjects.

        Raises:
            DataError: an id that is not enrolled; nothing is removed then.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""

    @abstractmethod
    def has_subjects(self, subject_ids: ArrayLike) -> NDArray[np.bool_]:
        """(n,) whether each subject is enrolled."""

    @abstractmethod
    def _source(self, level: Level, count: int) -> Source:
        """What is searched at a level; `count` is what `len` said just now."""

    @abstractmethod
    def _with_calibration(self, points: tuple[Calibration, ...]) -> Self:
        """The gallery with these thresholds, durably."""

    def search(
        self,
        probes: NDArray[np.floating[Any]],
        *,
        top: int,
        level: Level = "entry",
        threshold: float | None = None,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> list[list[Candidate]]:
        """The `top` best candidates of each probe, best first.

        Equal scores are ordered by enrolment. The order is for display: `retrieval.metrics` counts a tie against the
        mate (pessimistic rank), whatever the list says.

        Args:
            probes: (P, D) of any length, or one (D,).
            top: length of each list; shorter where the gallery holds fewer.
            level: what a candidate is.
            threshold: leave out candidates that do not score higher.
            model_id: model of the probes; another one than that of the gallery is refused.
            contract: its input contract.

        Raises:
            DataError: an empty gallery, a probe without direction, another dimension or model.
        """
        return self._find(probes, Request(top, level == "subject", threshold), level, model_id, contract)

    def search_range(
        self,
        probes: NDArray[np.floating[Any]],
        *,
        threshold: float,
        level: Level = "entry",
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> list[list[Candidate]]:
        """All candidates of each probe that score higher than `threshold`, best first; otherwise as `search`."""
        return self._find(probes, Request(None, level == "subject", threshold), level, model_id, contract)

    def search_templates(
        self,
        probes: NDArray[np.floating[Any]],
        template_ids: ArrayLike,
        *,
        top: int,
        fusion: Fusion = "pooled",
        level: Level = "subject",
        threshold: float | None = None,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> dict[str, list[Candidate]]:
        """Search several probes of one person together.

        Args:
            probes: (P, D), un-normalised: with `pooled`, the length of an embedding is its weight.
            template_ids: (P,) which probes belong together.
            top: length of each list.
            fusion: how they are searched together.
            level: what a candidate is.
            threshold: leave out candidates that do not score higher.
            model_id: model of the probes.
            contract: its input contract.

        Returns:
            template id -> candidates, templates in the order of their first probe.

        Raises:
            DataError: as `search`; or embeddings of one template that cancel out.
        """
        names, groups = _templates(template_ids, len(probes))
        if fusion == "best":
            single = self.search(
                probes, top=top, level=level, threshold=threshold, model_id=model_id, contract=contract
            )
            merged: dict[str, list[Candidate]] = {name: [] for name in names}
            for group, candidates in zip(groups, single, strict=True):
                merged[names[group]].extend(candidates)
            return {name: _best(candidates, top, level) for name, candidates in merged.items()}
        check_embeddings(probes, self._info(0).dimension)
        sums = TemplateSums(len(names), probes.shape[1], Pooling(media=False))
        sums.add(groups, np.zeros(len(groups)), probes.astype(np.float32))
        fused = self.search(
            sums.finish()[0], top=top, level=level, threshold=threshold, model_id=model_id, contract=contract
        )
        return dict(zip(names, fused, strict=True))

    def calibrate(self, probes: EmbeddingSet, fpirs: Sequence[float], *, level: Level = "entry") -> Self:
        """Find and keep the thresholds of false-positive identification rates.

        Args:
            probes: a calibration set; those whose subject is not enrolled count as strangers, the others measure how
                many mates are found. One without an embedding counts too: as a search that finds nobody.
            fpirs: wanted rates, each in (0, 1).
            level: what a candidate is.

        Returns:
            The new state; `info.calibration` holds the thresholds, earlier ones are replaced.

        Raises:
            DataError: a rate out of range, no stranger among the probes, or too few of them with an embedding.
        """
        usable = probes.enrolled
        searches = iter(self.search(probes.embeddings[usable], top=1, level=level) if usable.any() else ())
        found = [next(searches) if is_usable else [] for is_usable in usable]
        subjects = probes.subject_ids.astype(np.str_)
        points = calibrated(found, subjects, self.has_subjects(subjects), fpirs, level, len(self), name=probes.name)
        return self._with_calibration(points)

    def calibration_at(self, level: Level) -> tuple[Calibration, ...]:
        """The calibrated thresholds that hold at a level.

        `entry` and `subject` share theirs, because the first candidate scores the same at both; templates (`pooled`)
        score otherwise. A threshold was found with single probes: for several fused into one (`search_templates`) it
        does not hold at any level.
        """
        return tuple(p for p in self._info(0).calibration if (p.level == "pooled") == (level == "pooled"))

    def strictest(self, score: float, level: Level) -> Calibration | None:
        """The threshold of the lowest rate, calibrated for `level`, at which `score` is accepted; None if at none."""
        passed = [point for point in self.calibration_at(level) if score > point.threshold]
        return min(passed, key=lambda point: point.fpir, default=None)

    def fpir_of(self, score: float, level: Level) -> float | None:
        """Its false-positive rate."""
        point = self.strictest(score, level)
        return None if point is None else point.fpir

    def check_model(self, model_id: str | None, contract: InputContract | None) -> None:
        """Refuse embeddings that are known to come from another model than those enrolled.

        Raises:
            DataError: both sides are known and differ.
        """
        info = self._info(0)
        for what, theirs, ours in (
            ("model", model_id, info.model_id),
            ("input contract", contract, info.contract),
        ):
            if theirs is not None and ours is not None and theirs != ours:
                raise DataError(
                    f"Gallery {info.name} holds embeddings of {what} {ours}; these are of {theirs}. Scores between "
                    "models mean nothing: embed both with the same one."
                )

    def _find(
        self,
        probes: NDArray[np.floating[Any]],
        request: Request,
        level: Level,
        model_id: str | None,
        contract: InputContract | None,
    ) -> list[list[Candidate]]:
        count = len(self)
        rows = self._unit_probes(probes, model_id, contract, count)
        return search_source(self._source(level, count), rows, request)

    def _unit_probes(
        self, probes: NDArray[np.floating[Any]], model_id: str | None, contract: InputContract | None, count: int
    ) -> NDArray[np.float32]:
        """(P, D) probes of length 1, after the checks that every search among `count` entries makes."""
        info = self._info(count)
        self.check_model(model_id, contract)
        if count == 0:
            raise DataError(f"Gallery {info.name} is empty; enrol someone with `aroface gallery add`.")
        rows = np.atleast_2d(np.asarray(probes))
        check_embeddings(rows, info.dimension)
        return as_unit(rows)


def _templates(template_ids: ArrayLike, count: int) -> tuple[list[str], NDArray[np.int64]]:
    """Names in the order of their first probe, and the place of each probe's name in them."""
    ids = np.asarray(template_ids).astype(np.str_)
    if ids.shape != (count,):
        raise DataError(f"{ids.shape} template ids for {count} probes; one for each is needed.")
    names, first, codes = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names))
    return names[order].tolist(), place[codes]


def _best(candidates: Sequence[Candidate], top: int, level: Level) -> list[Candidate]:
    """Each entry, or each subject, once with its best score, best first; equal scores as the lists had them.

    Whoever belongs to the best `top` belongs to those of the probe that scored highest, so lists of `top` are enough.
    """
    unique: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: (-candidate.score, candidate.rank)):
        unique.setdefault(candidate.entry_id if level == "entry" else candidate.subject_id, candidate)
    best = list(unique.values())[:top]
    return [candidate._replace(rank=rank) for rank, candidate in enumerate(best, start=1)]
