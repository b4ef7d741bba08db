"""Model and gallery together: enrol, search, compare, delete. Knows no HTTP."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ArofaceError, DataError
from aroface.types import Embedder
from launch.serve.batching import Batcher, QueueFullError
from launch.serve.stats import ServiceStats
from launch.serve.uploads import Detector, face_from_upload

if TYPE_CHECKING:
    from concurrent.futures import Future

    from retrieval.gallery import Calibration, Candidate, Gallery, Level

__all__ = ["ConflictError", "Enrolled", "FaceService", "Found", "NotEnrolledError"]

_ANSWER_TIMEOUT_S = 60.0

Answer = TypeVar("Answer")


class ConflictError(ArofaceError):
    """The gallery, as it is, cannot take the request: an entry id that is taken, or nobody to search."""


class NotEnrolledError(ArofaceError):
    """An entry or subject that the gallery does not hold."""


@dataclass(frozen=True)
class Found:
    """One candidate and what its score means."""

    candidate: "Candidate"
    point: "Calibration | None"  #: of the lowest calibrated false-positive rate at which it is accepted; None: at none


@dataclass(frozen=True)
class Enrolled:
    """One new entry."""

    entry_id: str
    subject_id: str
    norm: float  #: length of the embedding; low for faces that are hard to recognise


@dataclass(frozen=True)
class _Search:
    probe: NDArray[np.float32]
    top: int
    level: "Level"


class FaceService:
    """One model and one gallery; every method may be called from many threads.

    Args:
        embedder: the model.
        gallery: what is searched; the service is its only writer while it runs.
        stats: what is counted.
        detector: aligns photographs; None takes aligned crops and landmarks only.
        max_batch: faces embedded together at the most.
        max_queue: requests that may wait for the model; for the search, a batch of the model more.

    Raises:
        DataError: the gallery holds embeddings of another model or contract.
    """

    def __init__(
        self,
        embedder: Embedder,
        gallery: "Gallery",
        stats: ServiceStats,
        *,
        detector: Detector | None = None,
        max_batch: int = 32,
        max_queue: int = 256,
    ) -> None:
        gallery.check_model(embedder.model_id, embedder.contract)
        if gallery.info.dimension != embedder.embedding_dim:
            raise DataError(
                f"Gallery {gallery.info.name} has {gallery.info.dimension} dimensions, the model "
                f"{embedder.model_id} {embedder.embedding_dim}; build the gallery with this model."
            )
        self.embedder, self.stats, self.detector = embedder, stats, detector
        self._gallery = gallery
        self._writer = threading.Lock()
        self._decoding = threading.BoundedSemaphore(os.cpu_count() or 1)  # 12 megapixels in small files fill the memory
        self._embedding = Batcher(
            self._embed_batch,
            name="embed",
            max_batch=max_batch,
            max_queue=max_queue,
            on_batch=lambda size, seconds: stats.count_batch("embed", size, seconds),
        )
        self._searching = Batcher(
            self._search_batch,
            name="search",
            max_batch=4 * max_batch,
            max_queue=max_queue + max_batch,  # whoever has been embedded is not turned away
            on_batch=lambda size, seconds: stats.count_batch("search", size, seconds),
        )

    @property
    def gallery(self) -> "Gallery":
        """The newest state."""
        return self._gallery

    def depths(self) -> dict[str, int]:
        """Requests that wait, by worker."""
        return {"embed": self._embedding.depth, "search": self._searching.depth}

    def crop(self, data: bytes, landmarks: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        """The aligned face of an uploaded file; see `face_from_upload`."""
        size = self.embedder.contract.image_size
        with self._decoding:
            return face_from_upload(data, size=size, landmarks=landmarks, detector=self.detector)

    def embed(self, face: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(S, S, 3) crop to its (D,) embedding, un-normalised.

        Raises:
            QueueFullError: too many requests wait.
            DataError: the model gives no direction for this face.
        """
        return _answers([self._embedding.submit(face)])[0]

    def search(self, face: NDArray[np.uint8], *, top: int, level: "Level") -> list[Found]:
        """The best candidates for a face.

        Raises:
            QueueFullError: too many requests wait.
            ConflictError: the gallery is empty.
        """
        if len(self._gallery) == 0:
            raise ConflictError("The gallery is empty; enrol someone first.")
        (candidates,) = _answers([self._searching.submit(_Search(self.embed(face), top, level))])
        return [Found(candidate, self._gallery.strictest(candidate.score, level)) for candidate in candidates]

    def compare(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        """Cosine of two faces."""
        embeddings = _answers([self._embedding.submit(face) for face in (first, second)])
        a, b = (embedding.astype(np.float64) for embedding in embeddings)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def enrol(self, face: NDArray[np.uint8], subject_id: str, entry_id: str | None) -> Enrolled:
        """Add a face; it is on disk when this returns.

        Raises:
            ConflictError: the entry id is taken.
        """
        from retrieval.gallery import EnrolledIdError

        embedding = self.embed(face)
        with self._writer:
            name = entry_id or self._free_entry_id(subject_id)
            try:
                self._gallery = self._gallery.add(
                    embedding[None],
                    np.array([subject_id]),
                    np.array([name]),
                    model_id=self.embedder.model_id,
                    contract=self.embedder.contract,
                )
            except EnrolledIdError as error:
                raise ConflictError(
                    f"Entry {name} is enrolled already, and an id names one entry. Delete that entry first, send "
                    "another entry_id, or leave entry_id out to be given a new one."
                ) from error
            except DataError as error:
                raise ConflictError(str(error)) from error
        return Enrolled(name, subject_id, float(np.linalg.norm(embedding)))

    def remove(self, *, entry_id: str | None = None, subject_id: str | None = None) -> int:
        """Delete one entry, or all of a subject; returns how many entries went.

        Raises:
            NotEnrolledError: there is none.
            ConflictError: another process is changing the gallery.
        """
        from retrieval.gallery import GalleryBusyError

        with self._writer:
            try:
                self._gallery, removed = self._gallery.remove_counted(
                    entry_ids=[] if entry_id is None else [entry_id],
                    subject_ids=[] if subject_id is None else [subject_id],
                )
            except GalleryBusyError as error:
                raise ConflictError(str(error)) from error
            except DataError as error:
                raise NotEnrolledError(str(error)) from error
            return removed

    def close(self) -> None:
        """Answer what waits, then stop."""
        self._embedding.close()
        self._searching.close()

    @staticmethod
    def _free_entry_id(subject_id: str) -> str:
        import uuid

        return f"{subject_id}/{uuid.uuid4().hex[:12]}"

    def _embed_batch(self, faces: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32] | Exception]:
        embeddings = self.embedder.embed(np.stack(faces))
        norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        useless = DataError(f"The model {self.embedder.model_id} gives this image no direction: it shows no face.")
        return [
            embedding if np.isfinite(norm) and norm > 0 else useless
            for embedding, norm in zip(embeddings, norms, strict=True)
        ]

    def _search_batch(self, searches: Sequence[_Search]) -> "list[list[Candidate]]":
        """Searches of one level go through the index together; the longest list serves all of them."""
        gallery = self._gallery
        answers: list[list[Candidate]] = [[] for _ in searches]
        if len(gallery) == 0:  # emptied since the searches were queued
            return answers
        for level in {search.level for search in searches}:
            places = [place for place, search in enumerate(searches) if search.level == level]
            probes = np.stack([searches[place].probe for place in places])
            found = gallery.search(probes, top=max(searches[place].top for place in places), level=level)
            for place, candidates in zip(places, found, strict=True):
                answers[place] = candidates[: searches[place].top]
        return answers


def _answers(futures: "Sequence[Future[Answer]]") -> list[Answer]:
    """What the workers answer, in order.

    Raises:
        QueueFullError: not all in time; nobody works on the others any more.
    """
    until = time.monotonic() + _ANSWER_TIMEOUT_S
    try:
        return [future.result(max(0.0, until - time.monotonic())) for future in futures]
    except TimeoutError as error:
        for future in futures:
            future.cancel()
        raise QueueFullError(f"No answer within {_ANSWER_TIMEOUT_S:g} s; try again later.") from error
