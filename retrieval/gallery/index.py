"""From enrolled embeddings to a Faiss index, by kind."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery.store import IndexKind

__all__ = ["build_index"]


def build_index(kind: IndexKind, embeddings: NDArray[np.float32]) -> Any:
    """A Faiss index over (N, D) unit vectors; row i of `embeddings` is entry i of the index.

    The flat index is filled in one call: it reserves its N rows once, so that a memory-mapped array costs one copy
    (growing it block by block would hold up to twice that while it moves).
    """
    import faiss

    match kind:
        case "flat":
            index = faiss.IndexFlatIP(embeddings.shape[1])
            index.add(embeddings)
            return index
