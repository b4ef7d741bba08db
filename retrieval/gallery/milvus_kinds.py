"""Kinds of index on Milvus: what they are called there, how large they are, how much of them a search visits.

Milvus makes one index for each of its segments, 512 MB of vectors by default, and a search visits all of them: the
number of lists follows the rows of a segment, not those of the gallery. A segment of less than 1,024 rows gets no
index: it is compared row by row.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from aroface.errors import ConfigError
from retrieval.gallery.milvus_connection import is_lite
from retrieval.gallery.records import IndexKind

__all__ = ["MILVUS_KINDS", "Effort", "check_kind", "efforts_of", "index_of"]

_TYPES: dict[IndexKind, str] = {
    "flat": "FLAT",
    "ivf": "IVF_FLAT",
    "ivf-sq8": "IVF_SQ8",
    "ivf-pq": "IVF_PQ",
    "hnsw": "HNSW",
}
MILVUS_KINDS: tuple[IndexKind, ...] = tuple(_TYPES)
_NOT_IN_LITE = ("ivf-pq",)  # it takes the wish, and searches by brute force
_SEGMENT_BYTES = 512 << 20
_OTHER_BYTES = 2562  # of a row, as a server 2.3.5 counts ids of at most 512 bytes: 204,437 rows at D = 16
_ROWS_OF_A_LIST = 39
_CODE_DIMS = (8, 4, 2, 1)  # values behind one byte of IVF_PQ: the most that divides D
_VISITS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_KEPT = (16, 32, 64, 128, 256, 512)
_MOST_VISITS = 1 << 15  # that Milvus takes
_RESCORED: dict[IndexKind, tuple[int, ...]] = {"ivf-sq8": (4,), "ivf-pq": (4, 16, 64)}  # for each wanted one
_EXTRA_CANDIDATES = 16


@dataclass(frozen=True)
class Effort:
    """How much of an index a search looks at."""

    kind: str
    visits: int  #: lists visited in each segment (ivf) or candidates kept (hnsw); 0: what Milvus does of itself
    rescored: int  #: candidates compared again for each wanted one

    def among(self, matches: int, count: int) -> "Effort":
        """The effort of a search that may find only some of the entries: as many of those are visited as of all."""
        if not self.visits or not matches:
            return self
        return replace(self, visits=min(_MOST_VISITS, -(-self.visits * count // matches)))

    def first_list(self, top: int) -> int:
        """Candidates that are asked for, for a list of `top`."""
        return max(top + _EXTRA_CANDIDATES, self.rescored * top)

    def search_params(self, count: int) -> dict[str, Any]:
        """What Milvus is told, for a list of `count`."""
        if not self.visits:
            return {}
        if self.kind == "hnsw":
            return {"params": {"ef": max(self.visits, count)}}  # it refuses lists that are longer
        return {"params": {"nprobe": self.visits}}


def check_kind(kind: IndexKind, uri: str, version: str) -> None:
    """Refuse what a server does not have.

    Raises:
        ConfigError: a kind that Milvus does not have under this name, or that Milvus Lite only pretends to have.
    """
    offered = [name for name in MILVUS_KINDS if not (is_lite(version) and name in _NOT_IN_LITE)]
    if kind not in MILVUS_KINDS:
        raise ConfigError(f"index {kind} is not offered on Milvus; choose from {', '.join(offered)}.")
    if kind not in offered:
        raise ConfigError(
            f"index {kind} is not offered by Milvus Lite ({uri}), which would compare with every entry. Use a server "
            f"of Milvus (http://host:19530), or choose from {', '.join(offered)}."
        )


def index_of(kind: IndexKind, dimension: int, rows: int | None = None) -> tuple[str, dict[str, int]]:
    """Name and parameters of an index in Milvus, for so many rows; None: as many as a segment holds, or more.

    `ivf-pq` has codes of D/8 bytes. SCANN of Milvus, with 4-bit codes, would need twice that.
    """
    if kind == "hnsw":
        return _TYPES[kind], {"M": 32, "efConstruction": 100}
    if kind == "flat":
        return _TYPES[kind], {}
    params = {"nlist": _num_lists(dimension, rows)}
    if kind == "ivf-pq":
        group = next(size for size in _CODE_DIMS if dimension % size == 0)
        params |= {"m": dimension // group, "nbits": 8}
    return _TYPES[kind], params


def _num_lists(dimension: int, rows: int | None) -> int:
    """Lists of an inverted file over n rows of a segment: the power of two near 4 sqrt(n), 39 rows for each at least.

    4 sqrt(n) is what Milvus advises (milvus.io/docs/performance_faq.md); with fewer than 39 rows Faiss warns.
    """
    full = _SEGMENT_BYTES // (4 * dimension + _OTHER_BYTES)
    count = full if rows is None else min(rows, full)
    return int(2 ** max(0, min(round(math.log2(4 * math.sqrt(count))), math.floor(math.log2(count / _ROWS_OF_A_LIST)))))


def efforts_of(kind: IndexKind, params: dict[str, int]) -> list[tuple[int, int]]:
    """(visits, rescored) for an index with these parameters, cheapest first."""
    if kind == "hnsw":
        return [(kept, 1) for kept in _KEPT]
    most = max(params["nlist"], _VISITS[0])
    return [(visits, rescored) for rescored in _RESCORED.get(kind, (1,)) for visits in _VISITS if visits <= most]
