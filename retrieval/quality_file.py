"""Qualities of images from a text file, such as XQLFW's scores: what discards and weights are based on."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.protocols.text_tables import read_lines

__all__ = ["QualityFile"]

_LAST_NUMBER = re.compile(r"(\d+)$")


class QualityFile:
    """One quality per image; larger is better.

    Lines are `image quality` (the key or the name of the file), or `person number quality` as XQLFW has them, apart by
    blanks, tabs or commas. A first line without a number at its end is a header.

    Args:
        path: the file.

    Raises:
        DataError: missing, empty, a line of another form, or an image that is listed twice; with the line number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str | tuple[str, int], float] = {}
        for number, line in enumerate(read_lines(path), start=1):
            fields = line.replace(",", " ").split()
            value = _number(fields[-1])
            if number == 1 and value is None:
                continue
            if value is None or len(fields) not in (2, 3) or (len(fields) == 3 and not fields[1].isdigit()):
                raise DataError(
                    f"{path}, line {number}: {line[:60]!r} is neither `image quality` nor `person number quality`."
                )
            key = fields[0] if len(fields) == 2 else (fields[0], int(fields[1]))
            if key in self._values:
                raise DataError(f"{path}, line {number}: {' '.join(fields[:-1])} is listed a second time.")
            self._values[key] = value
        if not self._values:
            raise DataError(f"{path} lists no qualities; a line is `image quality`.")

    def rate(self, keys: Sequence[str]) -> NDArray[np.float32]:
        """(N,) qualities of images.

        Raises:
            DataError: an image is not listed.
        """
        return np.array([self._of(key) for key in keys], np.float32)

    def _of(self, key: str) -> float:
        path = PurePosixPath(key)
        numbered = _LAST_NUMBER.search(path.stem)
        tries: list[str | tuple[str, int]] = [key, path.name, path.stem]
        tries += [(path.parent.name, int(numbered[1]))] if numbered else []
        for name in tries:
            if (value := self._values.get(name)) is not None:
                return value
        raise DataError(
            f"{self.path} has no quality of {key}; it lists {next(iter(self._values))!r} and "
            f"{len(self._values) - 1} more. Every image that is compared needs one."
        )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
