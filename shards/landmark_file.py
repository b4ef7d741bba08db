"""Landmarks by image name, from a CSV or JSON file beside the images."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from aroface.errors import DataError

__all__ = ["read_landmarks"]

_SHAPE = "key,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5"


def read_landmarks(path: Path) -> dict[str, list[float]]:
    """Five points per image: left eye, right eye, nose, left and right mouth corner, in pixels of the image.

    Args:
        path: `.json` with {"identity/image.jpg": [[x, y], ...]} (or ten numbers), or CSV lines
            `identity/image.jpg,x1,y1,...,x5,y5` with or without a header, or lines `image.jpg x1 y1 ... x5 y5 [score]`
            apart by blanks in a `.txt`, as IJB-B and IJB-C have them.

    Returns:
        Key of the image -> ten finite numbers.

    Raises:
        DataError: unreadable or malformed; the line or the key is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--landmarks {path} cannot be read: {error}.") from error
    if path.suffix.lower() == ".json":
        found = _from_json(path, text)
    elif path.suffix.lower() == ".txt" and "," not in text.partition("\n")[0]:
        found = _from_rows(path, ((row[:11] if len(row) == 12 else row) for row in map(str.split, text.splitlines())))
    else:
        found = _from_rows(path, csv.reader(text.splitlines()))
    if not found:
        raise DataError(f"--landmarks {path} holds no landmarks; each line is {_SHAPE}.")
    return found


def _from_json(path: Path, text: str) -> dict[str, list[float]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"--landmarks {path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(
            f"--landmarks {path} holds a JSON {type(values).__name__}; an object by image name is expected."
        )
    return {key: _ten(points, f"--landmarks {path}, {key!r}") for key, points in values.items()}


def _from_rows(path: Path, rows: Iterable[list[str]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for number, row in enumerate(rows, start=1):
        if not row or (number == 1 and len(row) == 11 and not _is_number(row[1])):
            continue
        where = f"--landmarks {path}, line {number}"
        if len(row) != 11:
            raise DataError(f"{where}: {len(row)} columns; expected {_SHAPE}.")
        if row[0] in found:
            raise DataError(f"{where}: {row[0]!r} is listed a second time.")
        found[row[0]] = _ten(row[1:], where)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ten(points: Any, where: str) -> list[float]:
    try:
        values = np.asarray(points, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: not numbers ({error}).") from error
    if values.shape != (10,) or not np.isfinite(values).all():
        raise DataError(f"{where}: five points of finite x and y are needed, found {values.size} numbers.")
    return [float(value) for value in values]
