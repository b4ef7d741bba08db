"""Galleries on one GPU or several: the vectors are spread over the devices, every probe goes to all of them.

    flat, fp16         exact: products of PyTorch with float32 or float16 vectors. The float16 scores are off by a known
                       bound, and candidates are compared again with the float32 vectors until no other can belong to
                       the list.
    ivf, -fp16, -sq8   the index of the gallery, moved to the devices by Faiss, whose build has to support GPUs; in
                       shards of the inverted lists where there are several. float16 is a form of the index: the
                       cloner's own switch does nothing for it.
    others             stay on the CPU: Faiss has no GPU form of fast-scan codes and graphs.

A change of the gallery leaves what is on the devices alone, as an index on the CPU: entries enrolled since are compared
on the CPU, removed ones are skipped.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ConfigError
from retrieval.gallery.flat_on_gpu import FlatOnGPU
from retrieval.gallery.records import IndexKind
from retrieval.gallery.search import rounding_bound
from retrieval.gallery.segments import Rows
from retrieval.gallery.sources import TrackedIndex
from retrieval.gallery.store import IndexRecord, Manifest

if TYPE_CHECKING:
    import torch

__all__ = ["GPU_KINDS", "DeviceCopy", "flat_on", "on_devices"]

GPU_KINDS: tuple[IndexKind, ...] = ("flat", "fp16", "ivf", "ivf-fp16", "ivf-sq8")
_EXACT_KINDS: tuple[IndexKind, ...] = ("flat", "fp16")
#: Longest list that Faiss selects on a GPU.
MAX_LIST = 2048
#: Removed entries that an exact copy may still hold, for which every list is longer.
_MOST_REMOVED = 1024
#: Entries enrolled since it was filled: so many, or this share of all where that is more. They lie in the CPU's memory
#: and are read at every search, 2 KiB each at 512 dimensions.
_MOST_ADDED, _ADDED_SHARE = 10_000, 0.01
_EXTRA_CANDIDATES = 16
#: Rounding of one float16 value relative to it, twice: the probe is rounded too.
_FLOAT16_BOUND = 2 * 2.0**-11 + 2.0**-16


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
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            reason = lines[0 if kind in _EXACT_KINDS else -1]  # Faiss ends with it, behind its stack trace
            smaller = "" if kind == "fp16" else "Change it to fp16 with `aroface gallery compact --index`, "
            others = "name more GPUs" if smaller else "Name more GPUs"
            raise ConfigError(
                f"The gallery of {len(rows)} entries of kind {kind} could not be put on the GPUs {self._devices} "
                f"({reason}). {smaller}{others}, or choose cpu."
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
    if kind in _EXACT_KINDS:
        return flat_on([_device(number) for number in devices], rows, numbers, use_float16=kind == "fp16")
    if index is None:
        raise ValueError(f"a gallery of kind {kind} without an index")
    import faiss
    import torch

    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            f"A gallery of kind {kind} is searched on a GPU by Faiss, and the Faiss here has no support for GPUs. "
            "Install faiss-gpu in its place, change the gallery to fp16 with `aroface gallery compact --index`, or "
            "choose the device cpu."
        )
    torch.cuda.empty_cache()  # what PyTorch keeps of an exact copy before is nothing that Faiss could use
    resources = [faiss.StandardGpuResources() for _ in devices]
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


def _device(number: int) -> "torch.device":
    import torch

    return torch.device("cuda", number)


def flat_on(
    devices: "Sequence[torch.device]", rows: Rows, numbers: NDArray[np.int64], *, use_float16: bool
) -> TrackedIndex:
    """Exact search on devices of PyTorch.

    Args:
        devices: each takes as many rows, one after the other.
        rows: (N, D).
        numbers: (N,) of the entries.
        use_float16: whether the devices keep float16.
    """
    return TrackedIndex(
        FlatOnGPU(rows, devices, use_float16=use_float16),
        numbers,
        candidates=1,
        least=_EXTRA_CANDIDATES,
        tolerance=rounding_bound(rows.dimension) + (_FLOAT16_BOUND if use_float16 else 0.0),
        has_one_user=True,
    )
