"""Embedding files (`.npz`): what `aroface embed` writes and every evaluation reads. No pickle, ever.

embeddings    float32 (N, D), un-normalised
subject_ids   (N,) integers or fixed-width strings
template_ids, media_ids (N,), det_scores float32 (N,), fte bool (N,), keys (N,)    optional
metadata      0-d string, JSON: model id, contract, flip                           optional
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path

__all__ = ["EmbeddingSet", "concatenate", "read_embeddings", "write_embeddings"]

_BLOCK_ROWS = 8192
_OPTIONAL = ("template_ids", "media_ids", "det_scores", "fte", "keys")


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings with what belongs to each row. Checked when it is made."""

    embeddings: NDArray[np.float32]  #: (N, D), un-normalised
    subject_ids: NDArray[Any]  #: (N,) integers or strings
    template_ids: NDArray[Any] | None = None  #: (N,)
    media_ids: NDArray[Any] | None = None  #: (N,)
    det_scores: NDArray[np.float32] | None = None  #: (N,)
    fte: NDArray[np.bool_] | None = None  #: (N,) failures to enrol
    keys: NDArray[Any] | None = None  #: (N,) names of the images
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = "embeddings"  #: what error messages call the set

    def __post_init__(self) -> None:
        values = self.embeddings
        if values.ndim != 2 or values.dtype != np.float32 or 0 in values.shape:
            raise DataError(
                f"{self.name}: embeddings must be float32 of shape (N, D), not {values.dtype} {values.shape}."
            )
        for key in ("subject_ids", *_OPTIONAL):
            array = getattr(self, key)
            if array is not None and array.shape != (len(values),):
                raise DataError(
                    f"{self.name}: {key} has shape {array.shape}; {len(values)} embeddings need ({len(values)},)."
                )
        if self.subject_ids.dtype.kind not in "iuUS":
            raise DataError(
                f"{self.name}: subject_ids are {self.subject_ids.dtype}; integers or fixed-width strings are allowed."
            )
        if self.fte is not None and self.fte.dtype != np.bool_:
            raise DataError(f"{self.name}: fte is {self.fte.dtype}; it must be bool.")
        bad = np.flatnonzero(~np.isfinite(values).all(1) & ~self._marked)
        if len(bad):
            raise DataError(
                f"{self.name}: {len(bad)} embedding(s) hold NaN or infinity (row {bad[0]} first). Mark such rows by "
                "fte = True, or mend the model."
            )

    @property
    def _marked(self) -> NDArray[np.bool_]:
        return np.zeros(len(self.embeddings), bool) if self.fte is None else self.fte

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def enrolled(self) -> NDArray[np.bool_]:
        """(N,) rows with a usable embedding: not marked as failure to enrol, and not the zero vector."""
        return ~self._marked & self.embeddings.any(1)

    def unit(self, order: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """(N, D) float64 rows of length 1, zero where not enrolled; of all rows, or of those of `order`."""
        order = np.arange(len(self)) if order is None else order
        values = np.zeros((len(order), self.embeddings.shape[1]), np.float64)
        for start in range(0, len(values), _BLOCK_ROWS):  # no second copy of the whole set on the way
            rows = order[start : start + _BLOCK_ROWS]
            block = np.where(self.enrolled[rows, None], self.embeddings[rows], 0).astype(np.float64)
            lengths = np.linalg.norm(block, axis=1, keepdims=True)
            np.divide(block, lengths, out=values[start : start + len(rows)], where=lengths > 0)
        return values

    def take(self, rows: NDArray[Any]) -> "EmbeddingSet":
        """The given rows (indices or mask) as a set."""
        optional = {k: None if (a := getattr(self, k)) is None else a[rows] for k in _OPTIONAL}
        return EmbeddingSet(
            self.embeddings[rows], self.subject_ids[rows], **optional, metadata=self.metadata, name=self.name
        )


def concatenate(sets: Sequence[EmbeddingSet]) -> EmbeddingSet:
    """The rows of several sets, one after the other; optional columns stay where all sets have them."""
    columns = {key: [getattr(part, key) for part in sets] for key in _OPTIONAL}
    optional = {
        key: np.concatenate(arrays) for key, arrays in columns.items() if all(array is not None for array in arrays)
    }
    return EmbeddingSet(
        np.concatenate([part.embeddings for part in sets]),
        np.concatenate([part.subject_ids for part in sets]),
        **optional,
        metadata=sets[0].metadata,
        name=" + ".join(part.name for part in sets),
    )


def write_embeddings(path: Path, embeddings: EmbeddingSet) -> None:
    """Write one embedding file, atomically."""
    arrays = {"embeddings": embeddings.embeddings, "subject_ids": embeddings.subject_ids}
    arrays |= {key: array for key in _OPTIONAL if (array := getattr(embeddings, key)) is not None}
    arrays["metadata"] = np.array(json.dumps(dict(embeddings.metadata)))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_embeddings(path: Path) -> EmbeddingSet:
    """Read and check one embedding file.

    Raises:
        DataError: missing, not an .npz, a key missing, pickled content, or arrays that contradict one another.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; `aroface embed` writes embedding files.") from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as an embedding file ({error}). "
            "It must be an .npz of plain arrays, without pickles."
        ) from error
    missing = [key for key in ("embeddings", "subject_ids") if key not in arrays]
    if missing:
        raise DataError(f"{path} lacks {' and '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    known = {key: arrays[key] for key in _OPTIONAL if key in arrays}
    metadata = json.loads(str(arrays["metadata"])) if "metadata" in arrays else {}
    embeddings = arrays["embeddings"]
    if embeddings.dtype in (np.float16, np.float64):
        raise DataError(
            f"{path}: embeddings are {embeddings.dtype}; float32 is the format. Convert them once and save."
        )
    return EmbeddingSet(embeddings, arrays["subject_ids"], **known, metadata=metadata, name=str(path))
