"""Galleries on one GPU or several: the vectors are spread over the devices, every probe goes to all of them.

    flat, fp16         exact: GpuIndexFlat with float32 or float16 vectors. The float16 scores are off by a known bound,
                       and candidates are compared again with the float32 vectors until no other can belong to the list.
    ivf, -fp16, -sq8   the index of the gallery, moved to the devices; in shards of the inverted lists where there are
                       several. float16 is a form of the index: the cloner's own switch does nothing for it.
    others             stay on the CPU: Faiss has no GPU form of fast-scan codes and graphs.

Vectors go to a device in one call for each stretch of rows, and each stretch has an index of its own: an index that
grows would hold its old and its new memory at once. For the same reason a change of the gallery leaves what is on the
devices alone, as an index on the CPU: entries enrolled since are compared on the CPU, removed ones are skipped.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ConfigError
from retrieval.devices import gpu_numbers
from retrieval.gallery.records import IndexKind
from retrieval.gallery.search import rounding_bound
from retrieval.gallery.segments import Rows
from retrieval.gallery.sources import TrackedIndex
from retrieval.gallery.store import IndexRecord, Manifest

__all__ = ["GPU_KINDS", "MAX_LIST", "DeviceCopy", "on_devices", "parse_device", "sharded_flat"]

GPU_KINDS: tuple[IndexKind, ...] = ("flat", "fp16", "ivf", "ivf-fp16", "ivf-sq8")
_EXACT_KINDS: tuple[IndexKind, ...] = ("flat", "fp16")
#: Longest list that Faiss selects on a GPU.
MAX_LIST = 2048
#: Removed entries that an exact copy may still hold: the longest list has as many places for others.
_MOST_REMOVED = MAX_LIST // 2
#: Entries enrolled since it was filled: so many, or this share of all where that is more. They lie in the CPU's memory
#: and are read at every search, 2 KiB each at 512 dimensions.
_MOST_ADDED, _ADDED_SHARE = 10_000, 0.01
_STRETCH_BYTES = 1 << 31  # of float32 rows on the host at a time
_EXTRA_CANDIDATES = 16
#: Rounding of one float16 value relative to it, twice: the probe is rounded too.
_FLOAT16_BOUND = 2 * 2.0**-11 + 2.0**-16


def parse_device(device: str) -> list[int]:
    """Numbers of the GPUs of `cpu` (none), `cuda` (all), `cuda:0` or `cuda:0,2`.

    Raises:
        ConfigError: not such a name, or a GPU that Faiss does not see.
    """

    def available() -> int:
        import faiss

        return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0

    remedy = "Install a build of Faiss with GPU support (faiss-gpu)"
    return gpu_numbers(device, available, library="Faiss", remedy=remedy)


@dataclass(frozen=True)
class _Filled:
    gallery_id: str
    kind: IndexKind
    record: IndexRecord | None  #: None for the exact kinds, which take the vectors themselves
    tracked: TrackedIndex
    until: int  #: entries with this number or a higher one are not in it


class DeviceCopy:
    """What all states of one opened gallery have on the GPUs; thread-safe.

    Args:
        devices: GPUs.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = list(devices)
        self._filled: _Filled | None = None
        self._lock = threading.Lock()

    def of(
        self, manifest: Manifest, index: TrackedIndex | None, rows: Rows, numbers: NDArray[np.int64]
    ) -> tuple[TrackedIndex, int]:
        """The index to search for a state of the gallery, and the first entry number that is not in it.

        The devices are filled where they are empty, and again after a compaction of an `ivf` gallery or when the exact
        kinds have seen more changes than a search makes up for.

        Args:
            manifest: of the state.
            index: its index, for the kinds that have one.
            rows: its vectors.
            numbers: (N,) of its entries.

        Raises:
            ConfigError: a kind that stays on the CPU, or one that does not fit.
        """
        with self._lock:
            if self._filled is None or not _serves(self._filled, manifest, numbers):
                self._filled = None  # its memory first: both may not fit
                self._filled = self._fill(manifest, index, rows, numbers)
            return self._filled.tracked, self._filled.until

    def _fill(self, manifest: Manifest, index: TrackedIndex | None, rows: Rows, numbers: NDArray[np.int64]) -> _Filled:
        kind = manifest.index
        try:
            tracked = on_devices(kind, index, rows, numbers, self._devices)
        except RuntimeError as error:  # of Faiss, with its own stack trace in the text
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"The gallery of {len(rows)} entries of kind {kind} could not be put on the GPUs {self._devices} "
                f"({reason}). Change it to fp16 with `aroface gallery compact --index`, name more GPUs, or choose cpu."
            ) from error
        record = manifest.index_record
        if kind in _EXACT_KINDS or record is None:
            return _Filled(manifest.gallery_id, kind, None, tracked, manifest.next_number)
        return _Filled(manifest.gallery_id, kind, record, tracked, record.until)


def _serves(filled: _Filled, manifest: Manifest, numbers: NDArray[np.int64]) -> bool:
    """Whether what is on the devices is good enough for this state of the gallery."""
    if (filled.gallery_id, filled.kind) != (manifest.gallery_id, manifest.index):
        return False
    if filled.record is not None:
        return filled.record == manifest.index_record
    kept = int(np.searchsorted(numbers, filled.until))
    added, removed = len(numbers) - kept, len(filled.tracked.numbers) - kept
    return 0 <= removed <= _MOST_REMOVED and added <= max(_MOST_ADDED, _ADDED_SHARE * len(numbers))


def on_devices(
    kind: IndexKind, index: TrackedIndex | None, rows: Rows, numbers: NDArray[np.int64], devices: Sequence[int]
) -> TrackedIndex:
    """The gallery's search on GPUs.

    Args:
        kind: of the gallery.
        index: its index, for the kinds that have one.
        rows: its vectors.
        numbers: (N,) of its entries.
        devices: GPUs.

    Raises:
        ConfigError: a kind that stays on the CPU.
    """
    if kind not in GPU_KINDS:
        raise ConfigError(
            f"A gallery of kind {kind} is searched on the CPU only; on a GPU: {', '.join(GPU_KINDS)}. Change it with "
            "`aroface gallery compact --index`, or choose the device cpu."
        )
    import faiss

    resources = [faiss.StandardGpuResources() for _ in devices]
    if kind in _EXACT_KINDS:
        half = kind == "fp16"
        pairs = zip(resources, devices, strict=True)
        makers = [_flat_maker(resource, device, rows.dimension, half) for resource, device in pairs]
        return sharded_flat(rows, numbers, makers, use_float16=half, max_list=MAX_LIST)
    if index is None:
        raise ValueError(f"a gallery of kind {kind} without an index")
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    moved = faiss.index_cpu_to_gpu_multiple_py(resources, index.index, options, list(devices))
    return TrackedIndex(
        moved,
        index.numbers,
        candidates=index.candidates,
        least=index.least,
        max_list=MAX_LIST,
        has_one_user=True,
        keep=resources,
    )


def _flat_maker(resources: Any, device: int, dimension: int, use_float16: bool) -> Callable[[], Any]:
    import faiss

    def make() -> Any:
        config = faiss.GpuIndexFlatConfig()
        config.device = device
        config.useFloat16 = use_float16
        return faiss.GpuIndexFlatIP(resources, dimension, config)

    return make


def sharded_flat(
    rows: Rows,
    numbers: NDArray[np.int64],
    makers: Sequence[Callable[[], Any]],
    *,
    use_float16: bool,
    max_list: int,
    stretch_bytes: int = _STRETCH_BYTES,
) -> TrackedIndex:
    """Exact search over stretches of rows; each device has as many rows, one after the other.

    Args:
        rows: (N, D).
        numbers: (N,) of the entries.
        makers: one for each device; each makes an empty flat index there.
        use_float16: whether those keep float16.
        max_list: longest list that they give.
        stretch_bytes: of float32 rows in one index, and of the memory on the host while it is filled.
    """
    share = max(1, -(-len(rows) // len(makers)))
    size = max(1, min(share, stretch_bytes // (4 * rows.dimension)))
    kept: list[Any] = []
    for make, first in zip(makers, range(0, len(rows), share), strict=False):  # few rows: fewer devices
        last = min(first + share, len(rows))
        indexes = [make() for _ in range(first, last, size)]
        for index, start in zip(indexes, range(first, last, size), strict=True):
            index.add(rows.take(np.arange(start, min(start + size, last))))
        # One after the other: the stretches of a device share its memory and stream, which only one thread may use.
        kept.append(_shards(indexes, rows.dimension, threaded=False))
    shards = _shards(kept, rows.dimension, threaded=True)
    tolerance = rounding_bound(rows.dimension) + (_FLOAT16_BOUND if use_float16 else 0.0)
    return TrackedIndex(
        shards,
        numbers,
        candidates=1,
        least=_EXTRA_CANDIDATES,
        tolerance=tolerance,
        max_list=max_list,
        has_one_user=True,
        keep=[kept, makers],
    )


def _shards(indexes: Sequence[Any], dimension: int, *, threaded: bool) -> Any:
    """One index of several; places follow their order."""
    import faiss

    make: Any = faiss.IndexShards
    shards = make(dimension, threaded, True)
    for index in indexes:
        shards.add_shard(index)
    return shards
