"""`Gallery`: a gallery in one directory. One object is one whole state of it, read when it was opened."""

import logging
import uuid
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.contract import InputContract
from aroface.errors import DataError
from retrieval.devices import gpu_numbers
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery.enrolment import (
    Part,
    batch_of,
    batches_of,
    check_part,
    counted,
    enrolled_rows,
    free_names,
    more_subjects,
    opened,
    parts_of,
    replaced,
)
from retrieval.gallery.index import build_index, factory_of, open_index
from retrieval.gallery.interface import FaceGallery
from retrieval.gallery.on_gpu import DeviceCopy
from retrieval.gallery.recall import IndexWish
from retrieval.gallery.records import Calibration, GalleryInfo, IndexKind, Level
from retrieval.gallery.search import Source
from retrieval.gallery.segments import (
    Batch,
    Entries,
    Rows,
    Segment,
    next_segments,
    read_state,
    shared_entries,
    write_segments,
)
from retrieval.gallery.sources import FlatSource, IndexedSource, PooledSource, TrackedIndex
from retrieval.gallery.store import (
    Manifest,
    new_manifest,
    read_manifest,
    remove_unreferenced,
    replace_manifest,
    write_lock,
)
from retrieval.gallery.vectors import check_embeddings

__all__ = ["Gallery"]

_TAIL_SHARE = 0.1  # of entries outside the index, above which a compaction is worth it

logger = logging.getLogger(__name__)


class Gallery(FaceGallery):
    """Enrolled embeddings in a directory.

    Every change replaces the whole state at once: another process, or this one after a crash, sees the old gallery or
    the new one. A change costs what it changes, not the size of the gallery. Later changes of others need a new `open`.
    """

    def __init__(self, directory: Path, manifest: Manifest, segments: Sequence[Segment]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._segments = tuple(segments)
        self._index: TrackedIndex | None = None
        self._copy: DeviceCopy | None = None

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True, device: str = "cpu") -> Self:
        """Open a gallery for reading; its vectors stay on disk and are read through the memory map.

        Args:
            directory: of the gallery.
            verify: compare the checksums of all files, at the price of reading them once more.
            device: where to search: `cpu`, `cuda` (all GPUs), `cuda:0`, or `cuda:0,1`. The GPUs are filled at the
                first search, or by `make_ready`, and again after many changes; the states that come from this one by
                changes share what is there.

        Raises:
            DataError: no gallery there, or a damaged one.
            ConfigError: no such device, or a kind that is searched on the CPU only.
        """
        devices, state = gpu_numbers(device), cls._ready(directory, (), verify=verify)
        state._copy = DeviceCopy(devices) if devices else None
        return state

    @classmethod
    def _ready(
        cls, directory: Path, opened: Sequence[Segment], *, verify: bool, before: "Gallery | None" = None
    ) -> Self:
        """The present state with its index open; started over when a writer replaces it meanwhile."""
        while True:
            manifest, segments = read_state(directory, verify=verify, opened=opened)
            state = cls(directory, manifest, segments)
            if manifest.index_record is None:
                return state
            if before is not None and before.manifest.index_record == manifest.index_record:
                state._index = before._index
                return state
            try:
                state._index = open_index(directory, manifest)
                return state
            except FileNotFoundError:
                if read_manifest(directory).generation == manifest.generation:
                    raise

    @classmethod
    def build(
        cls,
        directory: Path,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        index: IndexKind | IndexWish = "flat",
        model_id: str | None = None,
        contract: InputContract | None = None,
        replace: bool = False,
    ) -> Self:
        """Make a gallery of (N, D) embeddings of any length; they are normalised.

        Args:
            directory: a new or empty one; or, with `replace`, an existing gallery, damaged or not.
            embeddings: (N, D), N at least 1.
            subject_ids: (N,) who each one is; kept as text.
            entry_ids: (N,) unique names of the entries, kept as text; default 0, 1, 2, ...
            index: how to search it.
            model_id: model that made the embeddings; later additions and probes of another one are refused.
            contract: what that model sees.
            replace: take the place of an existing gallery, in one step.

        Raises:
            DataError: nothing to enrol, a vector without direction, ids that repeat, or a directory in use.
        """
        check_embeddings(embeddings, None)
        part = Part(embeddings, subject_ids, entry_ids)
        if len(embeddings):
            check_part(part, ())
        return cls._build(directory, [part], index, model_id, contract, replace)

    @classmethod
    def build_from(
        cls,
        directory: Path,
        sets: Iterable[EmbeddingSet],
        *,
        index: IndexKind | IndexWish = "flat",
        model_id: str | None = None,
        contract: InputContract | None = None,
        replace: bool = False,
    ) -> Self:
        """Make a gallery of embedding sets that come one after the other; only one of them is in memory at a time.

        Rows that failed to enrol are left out; keys become entry ids. Other arguments and errors as `build`.
        """
        parts = (part for one in sets for part in parts_of(one))
        return cls._build(directory, parts, index, model_id, contract, replace)

    @classmethod
    def _build(
        cls,
        directory: Path,
        parts: Iterable[Part],
        index: IndexKind | IndexWish,
        model_id: str | None,
        contract: InputContract | None,
        replace: bool,
    ) -> Self:
        stream = iter(parts)
        first = next(stream, None)
        if first is None or not len(first.embeddings):
            raise DataError(f"Gallery {directory}: there is no embedding to enrol; give at least one.")
        wish = index if isinstance(index, IndexWish) else IndexWish(index)
        directory.mkdir(parents=True, exist_ok=True)
        with write_lock(directory):
            generation, keep = replaced(directory, replace)
            empty = new_manifest(
                uuid.uuid4().hex,
                generation=generation,
                dimension=first.embeddings.shape[1],
                index=wish.kind,
                model_id=model_id,
                contract=contract,
            )
            try:
                batches = batches_of(first, stream, empty.dimension)
                segments = tuple(write_segments(directory, empty.generation, 0, batches))
                built = cls(directory, *opened(directory, empty.model_copy(update={"segments": segments})))
                manifest = built._indexed(counted(built.manifest, built.entries), wish)
            except BaseException:
                remove_unreferenced(directory, keep)
                raise
            replace_manifest(directory, manifest)
        return cls.open(directory, verify=False)

    def add(
        self,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        upsert: bool = False,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> Self:
        """See `FaceGallery.add`. With an approximate index, new entries are compared one by one until `compact`."""
        with write_lock(self.directory):
            old = self.latest()
            old.check_model(model_id, contract)
            check_embeddings(embeddings, old.manifest.dimension)
            if entry_ids is None:
                entry_ids = free_names(old.entries, old.manifest.next_number, len(embeddings))
            part = Part(embeddings, subject_ids, entry_ids)
            names = np.asarray(part.entry_ids).astype(np.str_)
            enrolled = np.isin(old.entries.entry_ids, names)
            taken = () if upsert else old.entries.entry_ids[enrolled].tolist()
            subjects, names = check_part(part, taken)
            if not len(names):
                return old
            return old._changed(
                drop=enrolled if upsert and enrolled.any() else None,
                new=batch_of(embeddings, subjects, names, old.manifest.next_number),
                model_id=old.manifest.model_id or model_id,
                contract=old.manifest.contract or contract,
            )

    def remove(self, *, entry_ids: Collection[str] = (), subject_ids: Collection[str] = ()) -> Self:
        """See `FaceGallery.remove`. The embeddings leave the disk at once; codes in an index, with `compact`."""
        return self.remove_counted(entry_ids=entry_ids, subject_ids=subject_ids)[0]

    def remove_counted(self, *, entry_ids: Collection[str] = (), subject_ids: Collection[str] = ()) -> tuple[Self, int]:
        """As `remove`; also how many entries went, whatever other writers did just before or after."""
        with write_lock(self.directory):
            old = self.latest()
            drop = enrolled_rows(self.directory, old.entries, entry_ids, subject_ids)
            return old._changed(drop=drop) if drop.any() else old, int(drop.sum())

    def compact(self, index: IndexKind | IndexWish | None = None) -> Self:
        """Put small segments together and make the index anew, with everything enrolled and nothing else in it.

        Args:
            index: another way to search; default: as before.
        """
        with write_lock(self.directory):
            old = self.latest()
            wish = index if isinstance(index, IndexWish) else IndexWish(index or old.manifest.index)
            if len(old) and wish.kind != "flat":
                factory_of(wish.kind, len(old), old.manifest.dimension)
            return old._changed(merge_all=True, wish=wish)

    def latest(self) -> Self:
        """The present state of the directory; what is open already is not read again."""
        state = self._ready(self.directory, self._segments, verify=False, before=self)
        state._copy = self._copy
        return state

    def make_ready(self) -> None:
        """Do now what the first search would otherwise wait for, such as to fill the GPUs.

        Raises:
            ConfigError: a kind that is searched on the CPU only, or a gallery that does not fit on the GPUs.
        """
        if len(self):
            self._source("entry", len(self))

    def close(self) -> None:
        """Nothing to do: the memory maps go with the object."""

    def _info(self, count: int) -> GalleryInfo:
        """See `FaceGallery`."""
        manifest, record = self.manifest, self.manifest.index_record
        return GalleryInfo(
            name=str(self.directory),
            backend="faiss",
            count=count,
            num_subjects=manifest.num_subjects,
            dimension=manifest.dimension,
            index=manifest.index,
            model_id=manifest.model_id,
            contract=manifest.contract,
            recall=record.recall if record else None,
            how=f"{record.factory}, effort {record.effort}, {record.rescored} rescored per place" if record else "",
            calibration=manifest.calibration,
        )

    def __len__(self) -> int:
        """Enrolled entries."""
        return self.manifest.count

    @cached_property
    def entries(self) -> Entries:
        """Who is enrolled, in the order of enrolment."""
        whole, self._segments = shared_entries(self._segments)
        return whole

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """(N, D) unit vectors: memory-mapped where they lie in one segment, otherwise a copy of all."""
        return self._rows.whole

    @property
    def outside_index(self) -> tuple[int, int]:
        """Entries that are not in the index, and entries that have been removed and still have a code in it."""
        record = self.manifest.index_record
        if record is None:
            return 0, 0
        inside = int(np.searchsorted(self.entries.numbers, record.until))
        return len(self) - inside, record.rows - inside

    def has_subjects(self, subject_ids: ArrayLike) -> NDArray[np.bool_]:
        """(n,) whether each subject is enrolled."""
        return np.isin(np.asarray(subject_ids).astype(np.str_), self.entries.subject_ids)

    @cached_property
    def _rows(self) -> Rows:
        return Rows([segment.embeddings for segment in self._segments], self.manifest.dimension)

    def _source(self, level: Level, count: int) -> Source:
        return self._pooled if level == "pooled" else self._searched

    @cached_property
    def _pooled(self) -> PooledSource:
        return PooledSource(self._rows, self.entries)

    @cached_property
    def _searched(self) -> Source:
        record, index, rows = self.manifest.index_record, self._index, self._rows
        until = record.until if record else self.manifest.next_number
        if self._copy is not None:
            index, until = self._copy.of(self.manifest, index, rows, self.entries.numbers)
        return FlatSource(rows, self.entries) if index is None else IndexedSource(rows, self.entries, index, until)

    def _with_calibration(self, points: tuple[Calibration, ...]) -> Self:
        with write_lock(self.directory):
            old = self.latest()
            updates = {"generation": old.manifest.generation + 1, "calibration": points}
            replace_manifest(self.directory, old.manifest.model_copy(update=updates))
            return old.latest()

    def _changed(
        self,
        *,
        drop: NDArray[np.bool_] | None = None,
        new: Batch | None = None,
        merge_all: bool = False,
        wish: IndexWish | None = None,
        **updates: Any,
    ) -> Self:
        """Commit a change; the caller holds the lock."""
        manifest = self.manifest
        generation = manifest.generation + 1
        try:
            segments = next_segments(
                self.directory, generation, self._segments, drop=drop, new=new, merge_all=merge_all
            )
            count = manifest.count - (0 if drop is None else int(drop.sum())) + (len(new.entries) if new else 0)
            manifest = manifest.model_copy(
                update={
                    "generation": generation,
                    "segments": segments,
                    "count": count,
                    "num_subjects": manifest.num_subjects + more_subjects(self.entries.subject_ids, drop, new),
                    "next_number": manifest.next_number + (len(new.entries) if new else 0),
                    **updates,
                }
            )
            if wish is not None:
                state = opened(self.directory, manifest.model_copy(update={"index_record": None}), self._segments)
                manifest = type(self)(self.directory, *state)._indexed(state[0], wish)
        except BaseException:
            remove_unreferenced(self.directory, self.manifest.file_names)
            raise
        replace_manifest(self.directory, manifest)
        changed = self.latest()
        changed._hint()
        return changed

    def _indexed(self, manifest: Manifest, wish: IndexWish) -> Manifest:
        """The manifest with a new index over all entries, if the kind needs one."""
        if wish.kind == "flat" or not len(self.entries):
            return manifest.model_copy(update={"index": wish.kind, "index_record": None})
        generation, until = manifest.generation, manifest.next_number
        record = build_index(self.directory, generation, manifest.gallery_id, self._rows, self.entries, until, wish)
        return manifest.model_copy(update={"index": wish.kind, "index_record": record})

    def _hint(self) -> None:
        outside, removed = self.outside_index
        if outside + removed > _TAIL_SHARE * len(self):
            text = "%s: %d entries are not in its index and %d removed ones are: `aroface gallery compact` mends that."
            logger.info(text, self.directory, outside, removed)
