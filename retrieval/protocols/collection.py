"""The images that a protocol names: to be embedded, or already embedded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.align import align_face
from aroface.errors import DataError
from aroface.types import Embedder, FaceSet
from retrieval.embeddings import EmbeddingSet, concatenate
from retrieval.extraction import FlipMode, embed_face_set
from retrieval.parted_embeddings import PartedEmbeddings

__all__ = ["Collection", "EmbeddedCollection", "ImageCollection", "RatedCollection", "by_stem", "natural_embeddings"]

_CHUNK = 4096
_NAMED = 3


class Collection(Protocol):
    """Samples by name, embedded on demand."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of all samples, sorted."""
        ...

    @property
    def missing(self) -> int:
        """Samples that were asked for and are not there, or could not be read; each counts as a failure to enrol."""
        ...

    def chunks(
        self, keys: NDArray[Any], order: NDArray[np.int64], *, landmarks: NDArray[np.float32] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], EmbeddingSet]]:
        """(rows of `keys`, their embeddings) in the given order; rows that are missing are marked fte."""
        ...


class _Chosen:
    """Some images of a set, in any order, aligned by landmarks where there are any; -1 is an image that is missing."""

    def __init__(
        self, faces: FaceSet, keys: Sequence[str], places: Sequence[int], landmarks: NDArray[np.float32] | None
    ) -> None:
        self._faces, self._places, self._landmarks = faces, places, landmarks
        self.keys = keys
        self.identities: Sequence[str] = [""] * len(keys)

    def read(self, index: int) -> NDArray[np.uint8]:
        place = self._places[index]
        if place < 0:
            raise DataError(f"{self.keys[index]} is not in the collection.")
        pixels = self._faces.read(place)
        return pixels if self._landmarks is None else align_face(pixels, self._landmarks[index])


class ImageCollection:
    """Images and a model.

    Args:
        faces: the images.
        embedder: the model.
        flip: whether mirror images are added.
        batch_size: images per call of the model.
        on_progress: called with the number of images embedded so far.
    """

    def __init__(
        self,
        faces: FaceSet,
        embedder: Embedder,
        *,
        flip: FlipMode = "sum",
        batch_size: int = 64,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._faces, self._embedder = faces, embedder
        self._flip, self._batch_size, self._on_progress = flip, batch_size, on_progress
        self._place = {key: place for place, key in enumerate(faces.keys)}
        self.keys: Sequence[str] = sorted(faces.keys)
        self.missing = 0
        self._done = 0

    def chunks(
        self, keys: NDArray[Any], order: NDArray[np.int64], *, landmarks: NDArray[np.float32] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], EmbeddingSet]]:
        """See `Collection.chunks`."""
        _refuse_strangers(keys, self._place, what="the images")
        for start in range(0, len(order), _CHUNK):
            rows = order[start : start + _CHUNK]
            names = keys[rows].tolist()
            chosen = _Chosen(
                self._faces,
                names,
                [self._place.get(name, -1) for name in names],
                None if landmarks is None else landmarks[rows],
            )
            found = embed_face_set(
                self._embedder,
                chosen,
                flip=self._flip,
                batch_size=self._batch_size,
                metadata={} if landmarks is None else {"aligned_by": "the protocol's landmarks"},
                on_progress=lambda done: self._on_progress(self._done + done),
                may_all_fail=True,
            )
            self._done += len(rows)
            self.missing += len(found.unreadable)
            yield rows, found.embeddings


class RatedCollection:
    """A collection whose samples have the qualities of a table.

    Args:
        collection: the samples.
        rate: names -> (N,) their qualities; called with names of the collection only.
    """

    def __init__(self, collection: Collection, rate: Callable[[Sequence[str]], NDArray[np.float32]]) -> None:
        self._collection, self._rate = collection, rate
        self.keys: Sequence[str] = collection.keys
        self._known = set(collection.keys)

    @property
    def missing(self) -> int:
        """See `Collection.missing`."""
        return self._collection.missing

    def chunks(
        self, keys: NDArray[Any], order: NDArray[np.int64], *, landmarks: NDArray[np.float32] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], EmbeddingSet]]:
        """See `Collection.chunks`."""
        for rows, part in self._collection.chunks(keys, order, landmarks=landmarks):
            names = keys[rows].tolist()
            known = [place for place, name in enumerate(names) if name in self._known]
            qualities = np.zeros(len(names), np.float32)
            qualities[known] = self._rate([names[place] for place in known])
            yield rows, replace(part, qualities=qualities)


class EmbeddedCollection:
    """Embeddings with the names of their images; without names, rows are taken in the order of the protocol."""

    def __init__(self, embeddings: EmbeddingSet | PartedEmbeddings) -> None:
        self._embeddings = embeddings
        self._names: Sequence[str] | None = None if embeddings.keys is None else embeddings.keys.tolist()
        self._place = {name: place for place, name in enumerate(self._names or ())}
        if self._names is not None and len(self._place) != len(self._names):
            raise DataError(f"{embeddings.name}: two rows have one key; a sample has one embedding.")
        self.keys: Sequence[str] = sorted(self._place)
        self.missing = 0

    def chunks(
        self, keys: NDArray[Any], order: NDArray[np.int64], *, landmarks: NDArray[np.float32] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], EmbeddingSet]]:
        """See `Collection.chunks`; landmarks were used when the images were embedded."""
        if self._names is None:
            if len(self._embeddings) != len(keys):
                raise DataError(
                    f"{self._embeddings.name} has {len(self._embeddings)} rows and no `keys`; the protocol lists "
                    f"{len(keys)} samples. Embed exactly these, in the order of the list, or store `keys`."
                )
            places = np.arange(len(keys))
        else:
            _refuse_strangers(keys, self._place, what=self._embeddings.name)
            places = np.array([self._place.get(key, -1) for key in keys.tolist()])
        for start in range(0, len(order), _CHUNK):
            rows = order[start : start + _CHUNK]
            own = places[rows]
            part = self._embeddings.take(np.maximum(own, 0))
            failed = (own < 0) | ~part.enrolled
            self.missing += int((own < 0).sum())
            yield (
                rows,
                EmbeddingSet(
                    np.where(failed[:, None], np.float32(0), part.embeddings),
                    part.subject_ids,
                    fte=failed,
                    det_scores=part.det_scores,
                    qualities=part.qualities,
                    variances=part.variances,
                    metadata=self._embeddings.metadata,
                    name=self._embeddings.name,
                ),
            )


def _refuse_strangers(keys: NDArray[Any], place: Mapping[str, int], *, what: str) -> None:
    if len(keys) and not any(key in place for key in keys.tolist()):
        raise DataError(
            f"None of the {len(keys)} samples of the protocol is in {what}: it asks for {str(keys[0])!r}, there are "
            f"{', '.join(repr(key) for key in list(place)[:_NAMED])}. Name the folder that these paths start from."
        )


def natural_embeddings(
    collection: Collection, keys: NDArray[Any], subject_ids: NDArray[Any], *, name: str
) -> EmbeddingSet:
    """The embeddings of some samples, one row a template.

    Args:
        collection: where they are.
        keys: (N,) names.
        subject_ids: (N,).
        name: what messages call the set.
    """
    found = concatenate([part for _, part in collection.chunks(keys, np.arange(len(keys)))])
    return replace(found, subject_ids=subject_ids, fte=~found.enrolled, keys=keys, name=name)


def by_stem(keys: Sequence[str], folder: str) -> dict[str, str]:
    """File name without suffix -> key, of the samples in one folder of the collection.

    Raises:
        DataError: two files differ in their suffix only.
    """
    found: dict[str, str] = {}
    for key in keys:
        parent, _, file_name = key.rpartition("/")
        if parent.rpartition("/")[2] != folder:
            continue
        stem = file_name.rpartition(".")[0] or file_name
        if stem in found:
            raise DataError(f"{key} and {found[stem]} are two files of one name; the protocol means one. Remove one.")
        found[stem] = key
    return found
