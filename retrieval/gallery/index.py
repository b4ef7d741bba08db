"""Faiss indexes by kind: made from the vectors block by block, measured against exact search, opened memory-mapped.

    kind                      form of a vector          visits
    flat                      float32 (on disk)         all, exact; no index file
    fp16, sq8, pq             2, 1, 1/8 byte a value    all
    ivf, ivf-fp16, -sq8, -pq  4, 2, 1, 1/8 byte         the nearest of `num_clusters(N)` clusters
    hnsw, hnsw-fp16, -sq8     4, 2, 1 byte + 256 bytes  a graph of 32 neighbours

`pq` is a 4-bit product quantiser of four values each, scanned in registers (Andre et al., Quick ADC, and Faiss's
"fast scan"). Scalar quantisers hold less memory and are slower than `flat` on a CPU; `ivf-pq` is the fast one.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path
from retrieval.gallery.clusters import Clusters
from retrieval.gallery.recall import RECALL_TOP, IndexWish, cheapest, recall_of, sample_of
from retrieval.gallery.records import IndexKind, Recall
from retrieval.gallery.search import Request, search_source
from retrieval.gallery.segments import Entries, Rows
from retrieval.gallery.sources import FlatSource, IndexedSource, TrackedIndex
from retrieval.gallery.store import RESTORE, FileRecord, IndexRecord, Manifest, check_file, record_of

__all__ = ["build_index", "factory_of", "open_index"]

_TRAINED_LEAST = 1000
_TRAINING_POINTS = 64  # for each cluster
_CLUSTERS_LEARNT_SOON = 1 << 12  # two minutes of one core at D = 512
_ADD_ROWS = 1 << 14
_HNSW_NEIGHBOURS = 32
_HNSW_CONSTRUCTION = 100
_VISITS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 512)
#: (lists visited or candidates kept, rescored for each wanted one), tried in this order until the recall is reached.
_EFFORTS: dict[str, tuple[tuple[int, int], ...]] = {
    "scan": tuple((0, rescored) for rescored in (2, 4, 8, 16, 32, 64)),
    "ivf": tuple((visits, 4) for visits in _VISITS),
    "ivf-pq": tuple((visits, rescored) for rescored in (4, 16, 64) for visits in _VISITS),
    "hnsw": tuple((kept, 4) for kept in (16, 32, 64, 128, 256, 512)),
}
_RESCORED_LEAST = 32
_OWNER_MARK = b"\naroface gallery index of "


def factory_of(kind: IndexKind, count: int, dimension: int) -> str:
    """What Faiss calls the index of `kind` for `count` vectors.

    Raises:
        DataError: `flat` aside, fewer vectors than a quantiser can learn from.
    """
    family, _, form = kind.partition("-")
    if kind.startswith("hnsw"):
        return f"HNSW{_HNSW_NEIGHBOURS}" + {"": ",Flat", "fp16": "_SQfp16", "sq8": "_SQ8"}[form]
    if count < _TRAINED_LEAST and kind != "fp16":
        raise DataError(
            f"An index of kind {kind} learns from at least {_TRAINED_LEAST} entries, and there are {count}. Choose "
            "flat, which is exact and fast at this size."
        )
    group = next(size for size in (4, 3, 2, 1) if dimension % size == 0)
    forms = {"": "Flat", "fp16": "SQfp16", "sq8": "SQ8", "pq": f"PQ{dimension // group}x4fs"}
    if family == "ivf":
        return f"IVF{num_clusters(count)},{forms[form]}"
    return forms[kind]


def num_clusters(count: int) -> int:
    """A power of two near 4 sqrt(count), beyond a million 2 sqrt(count), with at least 39 vectors for each cluster.

    More clusters make shorter lists and so faster searches, but learning them costs the square of their number.
    """
    wanted = max(min(4 * math.sqrt(count), _CLUSTERS_LEARNT_SOON), 2 * math.sqrt(count))
    return int(2 ** min(round(math.log2(wanted)), math.floor(math.log2(count / 39))))


def build_index(
    directory: Path, generation: int, gallery_id: str, rows: Rows, entries: Entries, until: int, wish: IndexWish
) -> IndexRecord:
    """Train, fill, measure and write an index over all rows.

    Args:
        directory: of the gallery.
        generation: that will name the files.
        gallery_id: written behind the index, so that the file knows where it belongs.
        rows: (N, D) unit vectors; read in blocks, never copied as a whole.
        entries: of the rows.
        until: the next number that will be given.
        wish: which index.
    """
    import faiss

    factory = factory_of(wish.kind, len(rows), rows.dimension)
    index = faiss.index_factory(rows.dimension, factory, faiss.METRIC_INNER_PRODUCT)
    _prepare(index, wish.kind)
    if not index.is_trained:
        index.train(_training_sample(rows, factory))
    for block in rows.blocks(_ADD_ROWS):
        index.add(np.ascontiguousarray(block))
    effort, rescored, recall = _measured(index, wish, rows, entries, until)
    path = directory / f"index-{generation:08d}.faiss"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = faiss.PyCallbackIOWriter(file.write)  # type: ignore[attr-defined]  # exported at run time
        faiss.write_index(index, writer)  # by a path of its own Faiss would not tell a full disk as an OSError
        file.write(_OWNER_MARK + gallery_id.encode())
    indexed_path = directory / f"indexed-{generation:08d}.npy"
    with atomic_path(indexed_path) as temporary, temporary.open("wb") as file:
        np.save(file, entries.numbers, allow_pickle=False)
    return IndexRecord(
        file=record_of(path),
        indexed=record_of(indexed_path),
        rows=len(rows),
        until=until,
        factory=factory,
        effort=effort,
        rescored=rescored,
        recall=recall,
    )


def open_index(directory: Path, manifest: Manifest) -> TrackedIndex:
    """Open the index of a state through the memory map.

    Raises:
        DataError: it cannot be read, or it belongs to another gallery.
        FileNotFoundError: it has been deleted.
    """
    import faiss

    record, dimension = manifest.index_record, manifest.dimension
    if record is None:
        raise ValueError("a flat gallery has no index to open")
    path = check_file(directory, record.file, verify=False)
    _check_owner(path, manifest.gallery_id, record.file)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        numbers = np.load(directory / record.indexed.name, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        if not path.exists():  # a writer was faster; Faiss has no error of its own for that
            raise FileNotFoundError(path) from error
        raise DataError(f"{path} cannot be read: {error}. {RESTORE}") from error
    if (index.ntotal, index.d, len(numbers)) != (record.rows, dimension, record.rows):
        raise DataError(
            f"{path} holds {index.ntotal} vectors of {index.d} dimensions, where the manifest says {record.rows} of "
            f"{dimension}. {RESTORE}"
        )
    return _tracked(index, numbers, manifest.index, record.effort, record.rescored)


def _check_owner(path: Path, gallery_id: str, record: FileRecord) -> None:
    mark = _OWNER_MARK + gallery_id.encode()
    with path.open("rb") as file:
        file.seek(max(0, record.bytes - len(mark)))
        found = file.read()
    if found != mark:
        raise DataError(f"{path} is the index of another gallery. {RESTORE}")


def _tracked(index: Any, numbers: NDArray[np.int64], kind: IndexKind, effort: int, rescored: int) -> TrackedIndex:
    """How an index of `kind` is searched."""
    import faiss

    clusters = None
    if kind.startswith("ivf"):
        inverted = faiss.extract_index_ivf(index)
        inverted.nprobe = min(effort, inverted.nlist)
        clusters = None if inverted.by_residual else Clusters(inverted)
    elif kind.startswith("hnsw"):
        index.hnsw.efSearch = effort
    return TrackedIndex(index, numbers, candidates=rescored, least=_RESCORED_LEAST, clusters=clusters)


def _efforts(kind: IndexKind) -> tuple[tuple[int, int], ...]:
    return _EFFORTS.get(kind) or _EFFORTS.get(kind.partition("-")[0]) or _EFFORTS["scan"]


def _prepare(index: Any, kind: IndexKind) -> None:
    import faiss

    if kind.startswith("ivf"):
        faiss.extract_index_ivf(index).cp.max_points_per_centroid = _TRAINING_POINTS
        faiss.extract_index_ivf(index).cp.spherical = True  # vectors and centres have length 1
    elif kind.startswith("hnsw"):
        index.hnsw.efConstruction = _HNSW_CONSTRUCTION


def _training_sample(rows: Rows, factory: str) -> NDArray[np.float32]:
    clusters = int(factory[3:].partition(",")[0]) if factory.startswith("IVF") else 1024
    chosen = np.sort(
        np.random.default_rng(0).permutation(len(rows))[: max(_TRAINED_LEAST, _TRAINING_POINTS * clusters)]
    )
    return rows.take(chosen)


def _measured(index: Any, wish: IndexWish, rows: Rows, entries: Entries, until: int) -> tuple[int, int, Recall]:
    """The cheapest effort that reaches the wanted recall, and the recall there."""
    sample = sample_of(wish, len(rows), rows.dimension, rows.take)
    sample.see(FlatSource(rows, entries))

    def measure(effort: int, rescored: int) -> Recall:
        tracked = _tracked(index, entries.numbers, wish.kind, effort, rescored)
        source = IndexedSource(rows, entries, tracked, until)
        return recall_of(search_source(source, sample.probes, Request(top=min(RECALL_TOP, len(rows)))), sample)

    first, *others = _efforts(wish.kind)
    most = index.nlist if wish.kind.startswith("ivf") else math.inf
    return cheapest(wish, [first, *(effort for effort in others if effort[0] <= most)], measure)
