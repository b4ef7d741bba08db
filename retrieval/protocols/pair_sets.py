"""Verification sets as one file or folder: InsightFace's `.bin`, or a folder that `datasets` of Hugging Face saved.

A saved folder holds `*.arrow` (or `*.parquet`) with the columns image, index and is_same, one row per image; images 2 i
and 2 i + 1 are pair i, and `is_same` stands in both rows of a pair. The bcolz folders of AdaFace are not read: their
blocks need a decompressor that is no longer kept up; `.bin` holds the same sets.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aroface.bin_file import BinFile, read_bin_file
from aroface.errors import DataError

__all__ = ["read_pair_set"]

_COLUMNS = ("image", "index", "is_same")
_MAX_IMAGE_BYTES = 16 << 20
_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def read_pair_set(path: Path) -> BinFile:
    """Read either form; no code of the file runs.

    Raises:
        DataError: missing, damaged, of another form, or pairs that contradict themselves.
    """
    if not path.is_dir():
        return read_bin_file(path)
    files = sorted([*path.rglob("*.arrow"), *path.rglob("*.parquet")])
    if not files:
        what = (
            "is a bcolz folder, which is not read" if any(path.rglob("__attrs__")) else "holds no *.arrow or *.parquet"
        )
        raise DataError(f"{path} {what}; give the .bin of the same set, or a folder saved by Hugging Face's datasets.")
    rows = sorted((row for file in files for row in _rows(file)), key=lambda row: row[0])
    for place, (index, image, _) in enumerate(rows):
        if index != place:
            raise DataError(f"{path}: image {place} is missing or there twice (index {index} follows {place - 1}).")
        if not isinstance(image, bytes) or len(image) > _MAX_IMAGE_BYTES or not image.startswith(_MAGICS):
            raise DataError(f"{path}: image {place} is no JPEG or PNG file of at most {_MAX_IMAGE_BYTES} bytes.")
    flags = [bool(same) for _, _, same in rows]
    if not rows or len(rows) % 2 or flags[::2] != flags[1::2]:
        raise DataError(f"{path}: {len(rows)} images are no pairs, each with one is_same; copy the set again.")
    return BinFile([image for _, image, _ in rows], flags[::2])


def _rows(path: Path) -> Iterator[tuple[int, Any, bool]]:
    """(index, encoded image, is_same) of one file."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as source:
                table = ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as an Arrow file: {error}.") from error
    lacking = [name for name in _COLUMNS if name not in table.column_names]
    if lacking:
        raise DataError(f"{path} has no column {lacking[0]!r}; it has {', '.join(table.column_names)}.")
    indices = np.asarray(table.column("index").to_pylist(), np.int64).tolist()
    for index, cell, same in zip(indices, table.column("image"), table.column("is_same").to_pylist(), strict=True):
        value = cell.as_py()
        yield index, value.get("bytes") if isinstance(value, dict) else value, same
