"""A folder of embeddings whose parts are read when their rows are asked for, so that few of them are in memory at once.

Names, and which row is where, stay in memory. Rows asked for in the order in which they were embedded read every part
once; in any other order a part is read again after others have taken its place.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.embedding_files import part_readers
from retrieval.embeddings import OPTIONAL_COLUMNS, EmbeddingSet, concatenate

__all__ = ["PartedEmbeddings"]

_OPEN_PARTS = 2


class PartedEmbeddings:
    """Embeddings of a folder; rows, `keys` and optional columns as `read_embeddings` gives them.

    Args:
        folder: that `aroface embed --out DIR` wrote.

    Raises:
        DataError: as `read_embeddings`; every part is read and checked once, one after the other.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.metadata: Mapping[str, Any] = {}
        self._readers = part_readers(folder)
        keys: list[NDArray[Any]] = []
        counts, columns = [0], set(OPTIONAL_COLUMNS)
        for read in self._readers:
            part = read()
            self.metadata = self.metadata or part.metadata
            counts.append(len(part))
            columns -= {name for name in OPTIONAL_COLUMNS if getattr(part, name) is None}
            if part.keys is not None:
                keys.append(part.keys)
        self.keys = np.concatenate(keys) if "keys" in columns else None
        self._starts = np.cumsum(counts)
        self._columns = columns
        self._read: Callable[[int], EmbeddingSet] = lru_cache(maxsize=_OPEN_PARTS)(lambda part: self._readers[part]())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: NDArray[Any]) -> EmbeddingSet:
        """The given rows, in their order; memory for them and for a few parts."""
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        pieces, places = [], []
        for part in np.unique(part_of).tolist():
            own = np.flatnonzero(part_of == part)
            pieces.append(self._read(part).take(rows[own] - self._starts[part]))
            places.append(own)
        found = concatenate(pieces).take(np.argsort(np.concatenate(places)))
        kept = {name: getattr(found, name) for name in self._columns}
        return EmbeddingSet(found.embeddings, found.subject_ids, **kept, metadata=self.metadata, name=self.name)
