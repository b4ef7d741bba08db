"""Parquet files with image bytes, as `datasets` of Hugging Face store them: an image column and a label column.

A row can only be reached by unpacking its row group, so that reading rows in another order than the stored one would
unpack everything many times. `entries` therefore copies the image bytes once, in order, into a file of the scratch
folder, where they are then read by their offset.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import DataError
from shards.sources.base import Entry, suffix_of_bytes
from shards.sources.in_place import OpenFiles

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = ["ParquetSource"]

_IMAGE_NAMES = ("image", "img", "jpg", "bytes", "image_bytes")
_LABEL_NAMES = ("label", "identity", "class", "id", "subject", "person", "name")
_ROWS = 512


class ParquetSource:
    """Rows of one Parquet file, or of all in a folder.

    Args:
        path: file or folder.
        scratch: folder for the copied image bytes; kept until the caller removes it.
        label_field: name of the label column; None: the first known one.
    """

    def __init__(self, path: Path, *, scratch: Path, label_field: str | None = None) -> None:
        self._paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self._scratch = scratch
        self._labels = _LABEL_NAMES if label_field is None else (label_field,)
        self._files = OpenFiles(scratch)

    def entries(self) -> Iterator[Entry]:
        """Every row that holds an image; names are file and row number."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        for path in self._paths:
            yield from self._rows(path)

    def read(self, entry: Entry) -> bytes:
        """One image file, from the scratch folder."""
        data = self._files.read(entry.part, entry.offset, entry.length)
        if len(data) != entry.length:
            raise DataError(f"{self._scratch / entry.part}: {entry.key} is cut short; start the packing anew.")
        return data

    def _rows(self, path: Path) -> Iterator[Entry]:
        table = _open(path)
        with table:
            names = table.schema_arrow.names
            image = _column(path, names, _IMAGE_NAMES, "image")
            label = _column(path, names, self._labels, "label (--label-field)")
            part, row, offset = f"{path.stem}.images", 0, 0
            with (self._scratch / part).open("wb") as spool:
                for batch in table.iter_batches(batch_size=_ROWS, columns=[image, label]):
                    values = zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True)
                    for cell, value in values:
                        data = _image_bytes(cell, f"{path}: row {row}")
                        spool.write(data)
                        identity = _identity(value, f"{path}: row {row}")
                        yield Entry(identity, f"{path.stem}_{row:08d}{suffix_of_bytes(data)}", part, offset, len(data))
                        row, offset = row + 1, offset + len(data)
                spool.flush()
                os.fsync(spool.fileno())


def _open(path: Path) -> "ParquetFile":
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file; reading it needs pyarrow: pip install 'aroface[parquet]'."
        ) from error
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.") from error


def _column(path: Path, names: list[str], known: tuple[str, ...], what: str) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise DataError(f"{path} has no {what} column called {' or '.join(known)}; its columns are {', '.join(names)}.")
    return found


def _image_bytes(cell: Any, where: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or suffix_of_bytes(data) is None:
        raise DataError(f"{where} holds no image file; binary, or a struct with `bytes`, is expected.")
    return data


def _identity(value: Any, where: str) -> str:
    if isinstance(value, int) and value >= 0:
        return f"{value:08d}"
    if isinstance(value, str) and value.strip():
        return value.strip().replace("/", "_")
    raise DataError(f"{where}: the label {value!r} is no class index (0, 1, ...) and no name.")
