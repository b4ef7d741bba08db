"""Embeddings with what belongs to each row: what `aroface embed` makes and every evaluation works on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from aroface.contract import InputContract
from aroface.errors import DataError

__all__ = ["OPTIONAL_COLUMNS", "EmbeddingSet", "concatenate"]

_BLOCK_ROWS = 8192
#: Columns that a set may lack; each has one value per row, `variances` one or D.
OPTIONAL_COLUMNS = ("template_ids", "media_ids", "det_scores", "fte", "keys", "qualities", "variances")


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
    qualities: NDArray[np.float32] | None = None  #: (N,) larger is better; None: the norm is the quality
    variances: NDArray[np.float32] | None = None  #: (N, D) or (N, 1), of models that tell how sure they are
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = "embeddings"  #: what error messages call the set

    def __post_init__(self) -> None:
        values = self.embeddings
        if values.ndim != 2 or values.dtype != np.float32 or 0 in values.shape:
            raise DataError(
                f"{self.name}: embeddings must be float32 of shape (N, D), not {values.dtype} {values.shape}."
            )
        for key in ("subject_ids", *OPTIONAL_COLUMNS):
            array = getattr(self, key)
            allowed = [(len(values), 1), values.shape] if key == "variances" else [(len(values),)]
            if array is not None and array.shape not in allowed:
                raise DataError(
                    f"{self.name}: {key} has shape {array.shape}; {len(values)} embeddings need "
                    f"{' or '.join(map(str, allowed))}."
                )
        self._check_types()
        bad = np.flatnonzero(~np.isfinite(values).all(1) & ~self._marked)
        if len(bad):
            raise DataError(
                f"{self.name}: {len(bad)} embedding(s) hold NaN or infinity (row {bad[0]} first). Mark such rows by "
                "fte = True, or mend the model."
            )
        self._check_sureness()

    def _check_types(self) -> None:
        if self.subject_ids.dtype.kind not in "iuUS":
            raise DataError(
                f"{self.name}: subject_ids are {self.subject_ids.dtype}; integers or fixed-width strings are allowed."
            )
        for key in ("subject_ids", "template_ids", "media_ids"):
            array = getattr(self, key)
            if array is not None and array.dtype.kind == "S" and not b"".join(array.tolist()).isascii():
                raise DataError(
                    f"{self.name}: {key} are bytes beyond ASCII, in a coding that nobody knows. Decode them and save "
                    "them as text."
                )
        if self.keys is not None and self.keys.dtype.kind != "U":
            raise DataError(f"{self.name}: keys are {self.keys.dtype}; names of images are strings.")
        if self.fte is not None and self.fte.dtype != np.bool_:
            raise DataError(f"{self.name}: fte is {self.fte.dtype}; it must be bool.")
        for key in ("det_scores", "qualities", "variances"):
            array = getattr(self, key)
            if array is not None and array.dtype.kind not in "iuf":
                raise DataError(f"{self.name}: {key} are {array.dtype}; numbers, such as float32, are allowed.")

    def _check_sureness(self) -> None:
        used = ~self._marked
        if self.variances is not None and not (np.isfinite(v := self.variances[used]) & (v > 0)).all():
            raise DataError(f"{self.name}: variances must be finite and above 0; a model that gives logarithms: exp.")
        if self.qualities is not None and not np.isfinite(self.qualities[used]).all():
            raise DataError(f"{self.name}: qualities must be finite numbers; larger is better.")

    @property
    def _marked(self) -> NDArray[np.bool_]:
        return np.zeros(len(self.embeddings), bool) if self.fte is None else self.fte

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def contract(self) -> InputContract | None:
        """What the model sees, where the metadata tell it.

        Raises:
            DataError: in another form.
        """
        found = self.metadata.get("contract")
        try:
            return None if found is None else InputContract.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("contract", *first["loc"])))
            raise DataError(
                f"{self.name}: metadata, {where}: {first['msg']}. An input contract is like "
                '{"image_size": 112, "colour_order": "rgb"}; mend it, or leave it out.'
            ) from error

    @cached_property
    def enrolled(self) -> NDArray[np.bool_]:
        """(N,) rows with a usable embedding: not marked as failure to enrol, and not the zero vector."""
        return ~self._marked & self.embeddings.any(1)

    @cached_property
    def quality(self) -> NDArray[np.float32]:
        """(N,) the qualities, or the norms where there are none; -inf where not enrolled."""
        values = np.linalg.norm(self.embeddings, axis=1) if self.qualities is None else self.qualities
        return np.where(self.enrolled, values, -np.inf).astype(np.float32)

    def pair_quality(self, first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """(P,) quality of pairs of rows: the smaller of the two."""
        lowest: NDArray[np.float32] = np.minimum(self.quality[first], self.quality[second])
        return lowest

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
        optional = {k: None if (a := getattr(self, k)) is None else a[rows] for k in OPTIONAL_COLUMNS}
        return EmbeddingSet(
            self.embeddings[rows], self.subject_ids[rows], **optional, metadata=self.metadata, name=self.name
        )


def concatenate(sets: Sequence[EmbeddingSet]) -> EmbeddingSet:
    """The rows of several sets, one after the other; optional columns stay where all sets have them."""
    columns = {key: [getattr(part, key) for part in sets] for key in OPTIONAL_COLUMNS}
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
