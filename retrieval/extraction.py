"""Images of a set -> embeddings, decoding in threads while the model computes."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.images import resize_face
from aroface.types import Embedder, FaceSet
from retrieval.embeddings import EmbeddingSet

__all__ = ["Extraction", "FlipMode", "Take", "Transform", "embed_face_set", "select_images"]

#: none: e(x). sum: e(x) + e(mirrored x), un-normalised, as the field's evaluation code does.
FlipMode = Literal["none", "sum"]
#: Which images of each identity: all, the first by name, or every other one.
Take = Literal["all", "first", "rest"]
#: Changes an image of any size before it is resized; called with the pixels and the key, from several threads.
Transform = Callable[[NDArray[np.uint8], str], NDArray[np.uint8]]

_BATCHES_AHEAD = 2
_NAMED_IN_WARNING = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """Embeddings of a set, and which images could not be read."""

    embeddings: EmbeddingSet
    unreadable: Mapping[str, str]  #: key -> what was wrong; its row is zero and marked failure-to-enrol


def select_images(face_set: FaceSet, take: Take) -> list[int]:
    """Indices of all images, of the first of each identity by key, or of the others; in the order of the set."""
    if take == "all":
        return list(range(len(face_set.keys)))
    first: dict[str, int] = {}
    for index, (identity, key) in enumerate(zip(face_set.identities, face_set.keys, strict=True)):
        if identity not in first or key < face_set.keys[first[identity]]:
            first[identity] = index
    chosen = set(first.values())
    return [index for index in range(len(face_set.keys)) if (index in chosen) == (take == "first")]


def embed_face_set(
    embedder: Embedder,
    face_set: FaceSet,
    *,
    indices: Sequence[int] | None = None,
    transform: Transform | None = None,
    flip: FlipMode = "none",
    batch_size: int = 64,
    decode_threads: int = 2,
    on_progress: Callable[[int], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
    may_all_fail: bool = False,
) -> Extraction:
    """Embed images of a set in its order.

    Args:
        embedder: the model.
        face_set: aligned faces of any size; each is resized to the model's input.
        indices: which images, in which order; None takes all.
        transform: a change to each image before it is resized, such as a degradation.
        flip: whether the mirror image is added.
        batch_size: images per call of the model.
        decode_threads: threads that read and decode ahead of the model.
        on_progress: called after each batch with the number of images done.
        metadata: entries for the result, beside `model_id`, `flip` and the contract.
        may_all_fail: this is a part of something larger, in which other images can be read.

    Returns:
        One row per index. An image that cannot be read has a zero row with fte = True, and is named in a warning.

    Raises:
        DataError: there is nothing to embed, every image is unreadable, or the model gave a value that is not finite.
    """
    chosen = range(len(face_set.keys)) if indices is None else indices
    if len(chosen) == 0:
        raise DataError("There is no image to embed; the selection is empty.")
    keys = [face_set.keys[index] for index in chosen]
    embeddings = np.zeros((len(keys), embedder.embedding_dim), np.float32)
    failed = np.zeros(len(keys), bool)
    unreadable: dict[str, str] = {}

    def load(index: int) -> NDArray[np.uint8] | DataError:
        try:
            pixels = face_set.read(index)
        except DataError as error:
            return error
        if transform is not None:
            pixels = transform(pixels, face_set.keys[index])
        return resize_face(pixels, embedder.contract.image_size)

    for start, loaded in _load_ahead(load, chosen, batch_size, decode_threads):
        rows = []
        for row, face in enumerate(loaded, start):
            if isinstance(face, DataError):
                failed[row] = True
                unreadable[keys[row]] = str(face)
            else:
                rows.append(row)
        if rows:
            faces = np.stack([face for face in loaded if not isinstance(face, DataError)])
            embeddings[rows] = _embed(embedder, faces, flip)
            _check_finite(embeddings[rows], [keys[row] for row in rows], embedder)
        if on_progress is not None:
            on_progress(start + len(loaded))
    _report_unreadable(unreadable, len(keys), may_all_fail=may_all_fail)
    described = {
        "model_id": embedder.model_id,
        "flip": flip,
        "contract": embedder.contract.model_dump(),
        **(metadata or {}),
    }
    result = EmbeddingSet(
        embeddings=embeddings,
        subject_ids=np.array([face_set.identities[index] for index in chosen]),
        keys=np.array(keys),
        fte=failed,
        metadata=described,
    )
    return Extraction(result, unreadable)


def _load_ahead(
    load: Callable[[int], NDArray[np.uint8] | DataError], indices: Sequence[int], batch_size: int, threads: int
) -> Iterator[tuple[int, list[NDArray[np.uint8] | DataError]]]:
    """(first row, images) per batch, with `_BATCHES_AHEAD` batches in the making while one is used."""
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        pending: list[tuple[int, list[Future[NDArray[np.uint8] | DataError]]]] = []
        try:
            for start in range(0, len(indices), batch_size):
                pending.append((start, [pool.submit(load, index) for index in indices[start : start + batch_size]]))
                if len(pending) > _BATCHES_AHEAD:
                    first, futures = pending.pop(0)
                    yield first, [future.result() for future in futures]
            for first, futures in pending:
                yield first, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _embed(embedder: Embedder, faces: NDArray[np.uint8], flip: FlipMode) -> NDArray[np.float32]:
    embeddings = embedder.embed(faces)
    if flip == "sum":
        embeddings = embeddings + embedder.embed(np.ascontiguousarray(faces[:, :, ::-1]))
    return embeddings


def _check_finite(embeddings: NDArray[np.float32], keys: list[str], embedder: Embedder) -> None:
    finite = np.isfinite(embeddings).all(1)
    if not finite.all():
        raise DataError(
            f"The model {embedder.model_id} gives an embedding that is not finite for {keys[int(finite.argmin())]}. "
            "Its training has diverged; take an earlier checkpoint."
        )


def _report_unreadable(unreadable: Mapping[str, str], total: int, *, may_all_fail: bool) -> None:
    if not unreadable:
        return
    named = "\n  ".join(list(unreadable.values())[:_NAMED_IN_WARNING])
    more = f"\n  and {len(unreadable) - _NAMED_IN_WARNING} more" if len(unreadable) > _NAMED_IN_WARNING else ""
    if len(unreadable) == total and not may_all_fail:
        raise DataError(f"None of the {total} images can be read:\n  {named}{more}")
    _log.warning("%d of %d images cannot be read and are marked fte:\n  %s%s", len(unreadable), total, named, more)
