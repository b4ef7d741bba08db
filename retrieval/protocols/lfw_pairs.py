"""Pairs of faces: read from a list in LFW's format, or drawn from a set."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from aroface.bin_file import BinFile
from aroface.errors import DataError
from aroface.images import decode_rgb
from aroface.types import FaceSet
from retrieval.metrics.verification import FoldAccuracy, kfold_accuracy
from retrieval.protocols.text_tables import read_lines

__all__ = [
    "Pairs",
    "bin_faces",
    "bin_pairs",
    "draw_pairs",
    "fold_accuracy",
    "is_list_of_files",
    "pairs_beside",
    "read_file_pairs",
    "read_lfw_pairs",
]

#: (P,) row of one side, (P,) of the other, (P,) True for genuine; as `evaluate_verification` takes it.
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]

_FOLDS = 10
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


def is_list_of_files(path: Path) -> bool:
    """Whether the list holds `file label` lines, as those of CALFW and CPLFW do."""
    fields = [line.split() for line in read_lines(path)[1:3]]
    return bool(fields) and all(len(row) == 2 and PurePosixPath(row[0]).suffix != "" for row in fields)


def read_file_pairs(path: Path, *, keys: Sequence[str]) -> Pairs:
    """Read `file label` lines, two consecutive ones a pair; a first line without a numeric label is a header.

    Files are found by their name in any folder. CALFW and CPLFW list all genuine pairs before all impostor pairs; such
    a list is put into the order of LFW's, ten folds of both kinds.

    Raises:
        DataError: a line of another form, an odd number of lines, two labels in one pair, or a file that is missing or
            there twice; with the line number.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[PurePosixPath(key).name].append(row)
    found: list[tuple[int, str]] = []
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if number == 1 and (len(fields) != 2 or not fields[1].isdigit()):
            continue
        if len(fields) != 2 or not fields[1].isdigit():
            raise DataError(f"{path}, line {number}: {line!r} is not `file label`.")
        if len(rows[fields[0]]) != 1:
            raise DataError(f"{path}, line {number}: there are {len(rows[fields[0]])} files {fields[0]!r}, not one.")
        found.append((rows[fields[0]][0], fields[1]))
    if not found or len(found) % 2:
        raise DataError(f"{path} lists {len(found)} files; two consecutive lines are a pair.")
    pairs = list(zip(found[::2], found[1::2], strict=True))
    differs = next((number for number, (one, two) in enumerate(pairs) if (one[1] == "0") != (two[1] == "0")), None)
    if differs is not None:
        raise DataError(f"{path}: the two lines of pair {differs + 1} have different labels; a line is missing.")
    same = np.array([one[1] != "0" for one, _ in pairs])
    order = np.arange(len(pairs))
    if same[: same.sum()].all():
        genuine, impostor = (np.array_split(np.flatnonzero(same == kind), _FOLDS) for kind in (True, False))
        order = np.concatenate([rows for fold in zip(genuine, impostor, strict=True) for rows in fold])
    first, second = (np.array([pair[side][0] for pair in pairs], np.int64)[order] for side in (0, 1))
    return first, second, same[order]


def bin_pairs(content: BinFile) -> Pairs:
    """Pairs of a .bin: images 2 i and 2 i + 1."""
    rows = np.arange(0, len(content.images), 2)
    return rows, rows + 1, np.array(content.is_same)


def bin_faces(content: BinFile) -> FaceSet:
    """Images of a .bin in order."""
    return _BinFaces(content)


class _BinFaces:
    def __init__(self, content: BinFile) -> None:
        self._images = content.images
        self.identities: Sequence[str] = [f"pair_{number // 2:05d}" for number in range(len(content.images))]
        self.keys: Sequence[str] = [f"{name}/{'ab'[i % 2]}" for i, name in enumerate(self.identities)]

    def read(self, index: int) -> NDArray[np.uint8]:
        return decode_rgb(self._images[index], name=self.keys[index])


def fold_accuracy(
    scores: NDArray[np.float32], same: NDArray[np.bool_], *, folds: int = _FOLDS
) -> tuple[FoldAccuracy | None, str | None]:
    """10-fold accuracy from cosines, or why there is none.

    Folds are contiguous; where one of them is nearly all genuine or all impostor (a list that is sorted by label), a
    threshold chosen on the others says nothing about it. A failed comparison counts as the largest distance.
    """
    if len(same) < 10 * folds:
        return None, f"{len(same)} pairs are too few for {folds} folds"
    shares = [float(part.mean()) for part in np.array_split(same, folds)]
    if min(shares) < 0.4 or max(shares) > 0.6:
        return None, "a fold has fewer than 40 % or more than 60 % genuine pairs; the list is not in the order of folds"
    distances = np.where(np.isfinite(scores), 2 - 2 * scores.astype(np.float64), 4.0)
    return kfold_accuracy(distances, same, folds=folds), None


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


def pairs_beside(faces: Path) -> Path | None:
    """The list NAME_pairs.txt beside a face set NAME.zip, if there is one."""
    beside = faces.parent / f"{faces.stem}_pairs.txt"
    return beside if beside.is_file() else None
