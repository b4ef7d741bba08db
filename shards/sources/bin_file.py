"""An InsightFace `.bin` verification set as a source."""

from collections.abc import Iterator
from pathlib import Path

from aroface.bin_file import BinFile, read_bin_file
from aroface.errors import DataError
from shards.sources.base import Entry, suffix_of_bytes

__all__ = ["BinSource"]


class BinSource:
    """The images of the pairs.

    Both of a genuine pair are one identity `pair_00000`, those of an impostor pair two, `pair_00000_a` and `_b`: the
    file does not say who they are, so the same person under another pair is another one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: BinFile | None = None

    def _read(self) -> BinFile:
        if self._content is None:
            self._content = read_bin_file(self._path)
        return self._content

    def entries(self) -> Iterator[Entry]:
        """Every image; `offset` is its number."""
        images, is_same = self._read()
        for number, data in enumerate(images):
            pair, side = divmod(number, 2)
            identity = f"pair_{pair:05d}" if is_same[pair] else f"pair_{pair:05d}_{'ab'[side]}"
            yield Entry(identity, f"{number:05d}{suffix_of_bytes(data)}", self._path.name, number, len(data))

    def read(self, entry: Entry) -> bytes:
        """One image file."""
        images = self._read().images
        if entry.offset >= len(images):
            raise DataError(f"{self._path} has {len(images)} images, no number {entry.offset}; it was replaced.")
        return images[entry.offset]
