"""Pairs of faces: read from a list in LFW's format, or drawn from a set."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError

__all__ = ["Pairs", "draw_pairs", "read_lfw_pairs"]

#: (P,) row of one side, (P,) of the other, (P,) True for genuine; as `evaluate_verification` takes it.
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]

_LAST_NUMBER = re.compile(r"(\d+)$")


def read_lfw_pairs(
    path: Path, *, keys: Sequence[str], identities: Sequence[str], max_missing: int = 0
) -> tuple[Pairs, list[str]]:
    """Read `name i j` (the same person) and `name1 i name2 j` (two persons) lines, tab separated.

    Image i of a person is the one whose file name ends in that number. A first line of numbers only, as LFW's own files
    have it, is skipped.

    Args:
        path: the list.
        keys: (N,) names of the images.
        identities: (N,) person of each.
        max_missing: pairs of images that the set lacks which are left out.

    Returns:
        The pairs, and one message for each pair that was left out.

    Raises:
        DataError: a line of another form, more missing images than allowed, or no pair; with the line number.
    """
    rows: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row, (key, identity) in enumerate(zip(keys, identities, strict=True)):
        if found := _LAST_NUMBER.search(PurePosixPath(key).stem):
            rows[identity, int(found[1])].append(row)
    pairs, missing = [], []
    for place, fields in _lines(path):
        sides = _sides(fields, place)
        lacking = [(name, number) for name, number in sides if len(rows[name, number]) != 1]
        if lacking:
            name, number = lacking[0]
            missing.append(f"{place}: the set has {len(rows[name, number])} images number {number} of {name}, not one.")
            if len(missing) > max_missing:
                raise DataError(
                    f"{missing[-1]} Take the list that belongs to the set, drop the line, or allow more of them with "
                    f"--max-missing-pairs (now {max_missing})."
                )
            continue
        pairs.append([*(rows[side][0] for side in sides), len(fields) == 3])
    if not pairs:
        raise DataError(f"{path} lists no pairs; a line is `name i j` or `name1 i name2 j`, tab separated.")
    first, second, same = np.array(pairs, np.int64).T
    return (first, second, same == 1), missing


def draw_pairs(identities: Sequence[str], *, most: int = 3000, seed: int = 0) -> Pairs:
    """As many genuine as impostor pairs: each image with the first of its person, and with one of another person.

    Args:
        identities: (N,) person of each image.
        most: genuine pairs at the most; drawn without replacement where there are more.
        seed: of the draw.

    Raises:
        DataError: fewer than two persons, or nobody with two images.
    """
    names = np.asarray(identities)
    _, first_rows, person = np.unique(names, return_index=True, return_inverse=True)
    others = np.flatnonzero(first_rows[person] != np.arange(len(names)))
    if len(others) == 0 or len(first_rows) < 2:
        raise DataError("Pairs need two persons at least, and one of them with two images; the set has no such pair.")
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(others)[:most])
    strangers = generator.integers(0, len(names), len(chosen))
    while (same := person[strangers] == person[chosen]).any():
        strangers[same] = generator.integers(0, len(names), int(same.sum()))
    first = np.concatenate([first_rows[person[chosen]], strangers])
    second = np.concatenate([chosen, chosen])
    return first.astype(np.int64), second.astype(np.int64), np.arange(2 * len(chosen)) < len(chosen)


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place for messages, fields) of each line that holds a pair."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        is_header = number == 1 and all(field.isdigit() for field in fields)
        if line.strip() and not is_header:
            yield f"{path}, line {number}", fields


def _sides(fields: list[str], place: str) -> list[tuple[str, int]]:
    match fields:
        case [name, i, j] if i.isdigit() and j.isdigit():
            return [(name, int(i)), (name, int(j))]
        case [name, i, other, j] if i.isdigit() and j.isdigit():
            return [(name, int(i)), (other, int(j))]
        case _:
            line = "\t".join(fields)
            raise DataError(f"{place}: {line!r} is neither `name i j` nor `name1 i name2 j`, tab separated.")
