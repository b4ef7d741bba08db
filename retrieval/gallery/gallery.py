"""`Gallery`: enrol, remove, search. One object is one whole state of the directory, read when it was opened."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.contract import InputContract
from aroface.errors import DataError, ShapeError
from retrieval.gallery.index import build_index
from retrieval.gallery.search import Candidate, Level, as_candidates, search_index
from retrieval.gallery.store import (
    Entries,
    IndexKind,
    Manifest,
    check_new,
    commit,
    concatenated,
    is_gallery,
    read_state,
    write_lock,
)

__all__ = ["Gallery"]

_BLOCK_ROWS = 1 << 12
_NAMED_ROWS = 5


class Gallery:
    """Enrolled embeddings in a directory, compared by cosine.

    Every change replaces the whole state at once: another process, or this one after a crash, sees the old gallery or
    the new one. Changes are streamed from file to file, so that their memory does not grow with the gallery. An opened
    gallery does not follow later changes of other processes; open it again to see them.
    """

    def __init__(self, directory: Path, manifest: Manifest, embeddings: NDArray[np.float32], entries: Entries) -> None:
        self.directory = directory
        self.manifest = manifest
        self.embeddings = embeddings  #: (N, D) float32 unit vectors, memory-mapped
        self.entries = entries

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> Self:
        """Open a gallery for reading.

        Args:
            directory: of the gallery.
            verify: compare the checksums of all files, at the price of reading them once more.

        Raises:
            DataError: no gallery there, or a damaged one.
        """
        return cls(directory, *read_state(directory, verify=verify))

    @classmethod
    def build(
        cls,
        directory: Path,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        index: IndexKind = "flat",
        model_id: str | None = None,
        contract: InputContract | None = None,
        replace: bool = False,
    ) -> Self:
        """Make a gallery of (N, D) embeddings of any length; they are normalised.

        Args:
            directory: a new or empty one; or, with `replace`, an existing gallery.
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
        _check_embeddings(embeddings, None)
        if len(embeddings) == 0:
            raise DataError(f"Gallery {directory}: there is no embedding to enrol; give at least one.")
        directory.mkdir(parents=True, exist_ok=True)
        with write_lock(directory):
            generation = 1
            if is_gallery(directory):
                if not replace:
                    raise DataError(
                        f"Gallery {directory} exists already. Add to it, name another one, or replace it (--replace)."
                    )
                generation = read_state(directory, verify=False)[0].generation + 1
            else:
                check_new(directory)
            entries = _entries(embeddings, subject_ids, entry_ids, taken=())
            commit(
                directory,
                _unit_blocks(embeddings),
                entries,
                generation=generation,
                dimension=embeddings.shape[1],
                index=index,
                model_id=model_id,
                contract=contract,
            )
        return cls.open(directory, verify=False)

    def add(
        self,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> Self:
        """Enrol (M, D) more embeddings; returns the new state.

        Raises:
            DataError: as `build`; an entry id that is taken; embeddings of another model or dimension.
        """
        with write_lock(self.directory):
            old = type(self).open(self.directory)
            old.check_model(model_id, contract)
            _check_embeddings(embeddings, old.manifest.dimension)
            new = _entries(embeddings, subject_ids, entry_ids, taken=set(old.entries.entry_ids.tolist()))
            blocks = chain(_copied_blocks(old.embeddings, None), _unit_blocks(embeddings))
            old._commit_next(blocks, concatenated([old.entries, new]), model_id, contract)
        return type(self).open(self.directory, verify=False)

    def remove(self, *, entry_ids: Collection[str] = (), subject_ids: Collection[str] = ()) -> Self:
        """Remove entries by their id, and all entries of subjects; returns the new state.

        Raises:
            DataError: an id that is not enrolled; nothing is removed then.
        """
        with write_lock(self.directory):
            old = type(self).open(self.directory)
            drop = np.zeros(len(old), bool)
            for what, ids, enrolled in (
                ("entry", entry_ids, old.entries.entry_ids),
                ("subject", subject_ids, old.entries.subject_ids),
            ):
                wanted = {str(value) for value in ids}
                missing = sorted(wanted - set(enrolled.tolist()))
                if missing:
                    raise DataError(
                        f"Gallery {self.directory} has no {what} {_listed(missing)}; `aroface gallery info` lists them."
                    )
                if wanted:
                    drop |= np.isin(enrolled, list(wanted))
            keep = np.flatnonzero(~drop)
            entries = Entries(old.entries.entry_ids[keep], old.entries.subject_ids[keep], old.entries.norms[keep])
            old._commit_next(_copied_blocks(old.embeddings, keep), entries, None, None)
        return type(self).open(self.directory, verify=False)

    def search(
        self,
        probes: NDArray[np.floating[Any]],
        *,
        top: int,
        level: Level = "entry",
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> list[list[Candidate]]:
        """The `top` best candidates of each probe, best first.

        Equal scores are ordered by enrolment. The order is for display: `retrieval.metrics` counts a tie against the
        mate (pessimistic rank), whatever the list says.

        Args:
            probes: (P, D) of any length, or one (D,).
            top: length of each list; shorter where the gallery holds fewer.
            level: `entry`, or `subject` for the best score of each subject.
            model_id: model of the probes; another one than that of the gallery is refused.
            contract: its input contract.

        Raises:
            DataError: an empty gallery, a probe without direction, another dimension or model.
        """
        self.check_model(model_id, contract)
        if len(self) == 0:
            raise DataError(f"Gallery {self.directory} is empty; enrol someone with `aroface gallery add`.")
        if top < 1:
            raise DataError(f"top = {top}; a candidate list has at least 1 entry.")
        rows = np.atleast_2d(np.asarray(probes))
        _check_embeddings(rows, self.manifest.dimension)
        unit = np.concatenate([np.zeros((0, self.manifest.dimension), np.float32), *_unit_blocks(rows)])
        subjects = self._subject_rows if level == "subject" else None
        found = search_index(self._index, self.embeddings, unit, top, subjects)
        return [as_candidates(rows, scores, self._name) for rows, scores in found]

    def check_model(self, model_id: str | None, contract: InputContract | None) -> None:
        """Refuse embeddings that are known to come from another model than those enrolled.

        Raises:
            DataError: both sides are known and differ.
        """
        enrolled = self.manifest
        for what, theirs, ours in (
            ("model", model_id, enrolled.model_id),
            ("input contract", contract, enrolled.contract),
        ):
            if theirs is not None and ours is not None and theirs != ours:
                raise DataError(
                    f"Gallery {self.directory} holds embeddings of {what} {ours}; these are of {theirs}. Scores "
                    "between models mean nothing: embed both with the same one."
                )

    def __len__(self) -> int:
        """Enrolled entries."""
        return self.manifest.count

    @cached_property
    def _index(self) -> Any:
        return build_index(self.manifest.index, self.embeddings)

    @cached_property
    def _subject_rows(self) -> NDArray[np.int64]:
        return np.unique(self.entries.subject_ids, return_inverse=True)[1].astype(np.int64)

    def _name(self, row: int) -> tuple[str, str]:
        return str(self.entries.entry_ids[row]), str(self.entries.subject_ids[row])

    def _commit_next(
        self,
        blocks: Iterator[NDArray[np.float32]],
        entries: Entries,
        model_id: str | None,
        contract: InputContract | None,
    ) -> None:
        commit(
            self.directory,
            blocks,
            entries,
            generation=self.manifest.generation + 1,
            dimension=self.manifest.dimension,
            index=self.manifest.index,
            model_id=self.manifest.model_id or model_id,
            contract=self.manifest.contract or contract,
        )


def _check_embeddings(embeddings: NDArray[Any], dimension: int | None) -> None:
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise ShapeError(f"Embeddings are {embeddings.dtype} {embeddings.shape}; float (N, D) is needed.")
    if dimension is not None and embeddings.shape[1] != dimension:
        raise DataError(
            f"The embeddings have {embeddings.shape[1]} dimensions, the gallery has {dimension}; embed with its model."
        )
    bad: list[int] = []
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        norms = np.linalg.norm(embeddings[start : start + _BLOCK_ROWS].astype(np.float64), axis=1)
        bad.extend(start + np.flatnonzero(~(np.isfinite(norms) & (norms > 0))))
    if bad:
        raise DataError(
            f"Rows {_listed(bad)} of the embeddings have no direction (zero, NaN or infinite). Leave them out: a face "
            "that failed to enrol has no embedding."
        )


def _entries(
    embeddings: NDArray[Any], subject_ids: ArrayLike, entry_ids: ArrayLike | None, *, taken: Collection[str]
) -> Entries:
    count = len(embeddings)
    subjects = np.asarray(subject_ids).astype(np.str_)
    names = np.asarray(_free_numbers(count, taken) if entry_ids is None else entry_ids).astype(np.str_)
    for what, values in (("subject ids", subjects), ("entry ids", names)):
        if values.shape != (count,):
            raise ShapeError(f"{values.shape} {what} for {count} embeddings; one for each is needed.")
    unique, counts = np.unique(names, return_counts=True)
    repeated = sorted({*unique[counts > 1].tolist(), *(set(unique.tolist()) & set(taken))})
    if repeated:
        raise DataError(
            f"Entry ids {_listed(repeated)} occur more than once; an entry id names one entry. Remove the enrolled one "
            "first, or give the new one another id."
        )
    norms = [np.linalg.norm(block, axis=1) for block in _float64_blocks(embeddings)]
    return Entries(names, subjects, np.concatenate([np.zeros(0), *norms]).astype(np.float32))


def _free_numbers(count: int, taken: Collection[str]) -> list[str]:
    start = max((int(name) + 1 for name in taken if name.isdecimal()), default=0)
    return [str(number) for number in range(start, start + count)]


def _float64_blocks(embeddings: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        yield embeddings[start : start + _BLOCK_ROWS].astype(np.float64)


def _unit_blocks(embeddings: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    for block in _float64_blocks(embeddings):
        yield (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float32)


def _copied_blocks(embeddings: NDArray[np.float32], keep: NDArray[np.int64] | None) -> Iterator[NDArray[np.float32]]:
    count = len(embeddings) if keep is None else len(keep)
    for start in range(0, count, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        yield embeddings[part] if keep is None else embeddings[keep[part]]


def _listed(values: Sequence[object]) -> str:
    named = ", ".join(map(str, values[:_NAMED_ROWS]))
    return named if len(values) <= _NAMED_ROWS else f"{named} and {len(values) - _NAMED_ROWS} more"
