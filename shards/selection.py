"""Which images of a table are packed, and which class each belongs to."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from shards.image_table import ImageTable

__all__ = ["Part", "Selection", "merged_names", "read_merges", "select"]

#: `rest` is what a holdout leaves, `holdout` the held-out identities themselves.
Part = Literal["rest", "holdout"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """M chosen images of C classes."""

    rows: NDArray[np.int64]  #: (M,) rows of the table, ascending
    label_of_identity: NDArray[np.int32]  #: (I,) class index of every identity of the table; -1: not packed
    names: Sequence[str]  #: (C,) class names, sorted


def read_merges(path: Path) -> dict[str, str]:
    """Read `identity,person` lines: images of `identity` become images of `person`.

    Raises:
        DataError: unreadable, or an identity is given to two people; the line is named.
    """
    merges: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--merge {path} cannot be read: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if number == 1 and row == ["identity", "person"]:
            continue
        if len(row) != 2 or not row[0] or not row[1]:
            raise DataError(f"--merge {path}, line {number}: expected identity,person, found {','.join(row)!r}.")
        if merges.setdefault(row[0], row[1]) != row[1]:
            raise DataError(f"--merge {path}, line {number}: {row[0]!r} is given to {merges[row[0]]!r} already.")
    return merges


def merged_names(table: ImageTable, merges: dict[str, str]) -> list[str]:
    """(I,) the person each identity of the table belongs to.

    Raises:
        DataError: the merges name an identity that no source holds.
    """
    unknown = sorted(set(merges) - set(table.identities))
    if unknown:
        raise DataError(f"--merge names the identity {unknown[0]!r} ({len(unknown)} such), which no source holds.")
    return [merges.get(identity, identity) for identity in table.identities]


def select(
    table: ImageTable,
    people: Sequence[str],
    *,
    dropped: NDArray[np.int64] | None = None,
    min_images: int = 1,
    only: Sequence[str] | None = None,
    holdout: int = 0,
    part: Part = "rest",
) -> Selection:
    """Choose people by name, number of images and holdout, and number them.

    Args:
        table: all images.
        people: (I,) from `merged_names`.
        dropped: rows that are left out before the images are counted.
        min_images: people with fewer are left out.
        only: people to keep; None keeps all.
        holdout: people set aside, those with the smallest hash of their name, so that a larger set of the same people
            holds out mostly the same ones.
        part: which side of the holdout is wanted.

    Raises:
        DataError: nothing is left, or a name is unknown.
    """
    rows = np.arange(len(table), dtype=np.int64)
    if dropped is not None and len(dropped):
        rows = np.delete(rows, dropped)
    everyone = sorted(set(people))
    place = {name: index for index, name in enumerate(everyone)}
    person = np.array([place[name] for name in people], np.int32)
    counts = np.bincount(person[table.identity[rows]], minlength=len(everyone))
    keep = counts >= min_images
    small = int(((counts > 0) & ~keep).sum())
    if small:
        logger.info("%d identities have fewer than %d images and are left out (--min-images).", small, min_images)
    if only is not None:
        keep &= _named(everyone, only)
    if not keep.any():
        raise DataError(
            f"No identity has {min_images} images or more: of {len(everyone)} identities the largest has "
            f"{int(counts.max())}. Lower --min-images."
        )
    if holdout:
        keep &= _held_out(everyone, keep, holdout) == (part == "holdout")
    class_of = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    labels = class_of[person]
    chosen = rows[labels[table.identity[rows]] >= 0]
    _refuse_equal_keys(table, chosen)
    return Selection(chosen, labels, [name for name, kept in zip(everyone, keep, strict=True) if kept])


def _named(everyone: Sequence[str], only: Sequence[str]) -> NDArray[np.bool_]:
    wanted = set(only)
    unknown = sorted(wanted - set(everyone))
    if unknown:
        raise DataError(f"--identities names {unknown[0]!r} ({len(unknown)} such), which the source does not hold.")
    return np.array([name in wanted for name in everyone])


def _held_out(everyone: Sequence[str], keep: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    candidates = np.flatnonzero(keep).tolist()
    if not 1 <= count < len(candidates):
        raise DataError(f"--holdout {count} of {len(candidates)} identities leaves none on one side; choose fewer.")
    digests = [blake2b(everyone[i].encode("utf-8", "surrogateescape"), digest_size=16).digest() for i in candidates]
    order = sorted(range(len(candidates)), key=digests.__getitem__)
    held = np.zeros(len(everyone), bool)
    held[[candidates[i] for i in order[:count]]] = True
    return held


def _refuse_equal_keys(table: ImageTable, rows: NDArray[np.int64]) -> None:
    """Two files of one sample key would be read as one sample; keys differ in the suffix or in dots only."""
    identity, seen = -1, dict[str, str]()
    for row in rows:  # not as a list of Python numbers, which would be the largest thing in memory
        if table.identity[row] != identity:
            identity, seen = int(table.identity[row]), {}
        name = table.name(row)
        other = seen.setdefault(name.rpartition(".")[0].replace(".", "_"), name)
        if other != name:
            first, second = (f"{table.identities[identity]}/{n}" for n in (other, name))
            raise DataError(f"{first!r} and {second!r} would have the same sample key in a shard; rename one of them.")
