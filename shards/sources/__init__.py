"""Image collections as they lie on disk, behind one interface.

A new layout is one file with a class that satisfies `Source`, one entry in `FORMATS`, one rule in `detect_format`.
"""

from dataclasses import dataclass
from pathlib import Path

from aroface.errors import DataError
from shards.sources.base import Entry, Source
from shards.sources.bin_file import BinSource
from shards.sources.folder import FolderSource
from shards.sources.list_file import LIST_SUFFIXES, ListSource
from shards.sources.parquet import ParquetSource
from shards.sources.recordio import RecordIoSource, recordio_prefix
from shards.sources.tar_file import TarSource
from shards.sources.webdataset_tars import WebDatasetSource, holds_labels
from shards.sources.zip_file import ZipSource

__all__ = ["FORMATS", "Entry", "Source", "SourceOptions", "detect_format", "open_source"]

#: format -> what it looks like
FORMATS = {
    "folder": "folder of identity/image.jpg",
    "zip": ".zip of identity/image.jpg, or a folder of such",
    "tar": ".tar of identity/image.jpg, or a folder of such",
    "recordio": "train.rec with train.idx and property (InsightFace, MXNet): the folder, the .rec or the prefix",
    "list": "text or CSV file of path, label and perhaps landmarks",
    "webdataset": ".tar of samples with .cls, .json or .txt labels, or a folder of such; also aroface's own shards",
    "parquet": ".parquet with an image and a label column, or a folder of such",
    "bin": "InsightFace's .bin verification set",
}


@dataclass(frozen=True)
class SourceOptions:
    """What the layouts may want to know."""

    layout: str | None = None  #: one of `FORMATS`; None detects it
    root: Path | None = None  #: of the relative paths in a list; None: the folder of the list
    label_field: str | None = None  #: of JSON members and Parquet columns; None: the first known name


def detect_format(path: Path) -> str:
    """The layout of `path`, one of `FORMATS`.

    Raises:
        DataError: the path is missing, or is of no known layout.
    """
    if recordio_prefix(path) is not None:
        return "recordio"
    if not path.exists():
        raise DataError(f"Source {path} does not exist.")
    if path.is_dir():
        return _format_of_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "webdataset" if holds_labels(path) else "tar"
    if suffix in (".zip", ".parquet", ".bin"):
        return suffix[1:]
    if suffix in LIST_SUFFIXES:
        return "list"
    known = "\n".join(f"  {name:<10}  {look}" for name, look in FORMATS.items())
    raise DataError(f"Source {path} is of no known layout; name it by --format:\n{known}")


def _format_of_folder(path: Path) -> str:
    """A folder that holds archives and no folders is a set of archives."""
    suffixes = set[str]()
    for entry in path.iterdir():
        if entry.is_dir():
            return "folder"
        suffixes.add(entry.suffix.lower())
    if ".tar" in suffixes:
        return "webdataset" if holds_labels(path) else "tar"
    return next((suffix[1:] for suffix in (".zip", ".parquet") if suffix in suffixes), "folder")


def open_source(path: Path, options: SourceOptions | None = None, *, scratch: Path | None = None) -> Source:
    """Open an image collection.

    Args:
        path: folder or file.
        options: of the layout.
        scratch: folder for unpacked copies where a layout cannot be read in place; None: such a layout is refused.

    Raises:
        DataError: nothing there, or another layout than said.
    """
    options = options or SourceOptions()
    layout = options.layout or detect_format(path)
    if not path.exists() and layout != "recordio":
        raise DataError(f"Source {path} does not exist.")
    match layout:
        case "folder":
            return FolderSource(path)
        case "zip":
            return ZipSource(path)
        case "tar":
            return TarSource(path)
        case "recordio":
            return RecordIoSource(path)
        case "list":
            return ListSource(path, root=options.root)
        case "webdataset":
            return WebDatasetSource(path, label_field=options.label_field)
        case "bin":
            return BinSource(path)
        case "parquet":
            if scratch is None:
                raise DataError(f"{path}: Parquet rows cannot be read one by one; run `aroface pack` on it first.")
            return ParquetSource(path, scratch=scratch, label_field=options.label_field)
        case other:
            raise DataError(f"--format {other} is unknown; choose from {', '.join(FORMATS)}.")
