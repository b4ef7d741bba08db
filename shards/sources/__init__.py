"""Image collections as they lie on disk, behind one interface.

A new layout is one file with a class that satisfies `Source`, one entry in `FORMATS`, one rule in `detect_format`.
"""

from pathlib import Path

from aroface.errors import DataError
from shards.sources.base import Entry, Source
from shards.sources.folder import FolderSource
from shards.sources.zip_file import ZipSource

__all__ = ["FORMATS", "Entry", "Source", "detect_format", "open_source"]

FORMATS = ("folder", "zip")


def detect_format(path: Path) -> str:
    """The layout of `path`, one of `FORMATS`.

    Raises:
        DataError: the path is missing, or is of no known layout.
    """
    if not path.exists():
        raise DataError(f"Source {path} does not exist.")
    if path.is_dir():
        return "folder"
    if path.suffix.lower() == ".zip":
        return "zip"
    raise DataError(
        f"Source {path} is neither a folder of identity/image.jpg nor a .zip of one; name the layout by --format."
    )


def open_source(path: Path, layout: str | None = None) -> Source:
    """Open an image collection.

    Args:
        path: folder or file.
        layout: one of `FORMATS`; None detects it.

    Raises:
        DataError: nothing there, or another layout than said.
    """
    match layout or detect_format(path):
        case "folder":
            return FolderSource(path)
        case "zip":
            return ZipSource(path)
        case other:
            raise DataError(f"--format {other} is unknown; choose from {', '.join(FORMATS)}.")
