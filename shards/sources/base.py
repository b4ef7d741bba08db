"""What every source of images is: a list of entries, and a way to read one of them."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from aroface.errors import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_IMAGE_BYTES",
    "Entry",
    "Landmarks",
    "Source",
    "entry_of_path",
    "size_of_file",
    "suffix_of_bytes",
]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

#: An image file that claims more than this is refused before it is read: no face crop is that large.
MAX_IMAGE_BYTES = 64 << 20

#: x and y of left eye, right eye, nose, left and right mouth corner, in pixels of the image.
Landmarks = tuple[float, float, float, float, float, float, float, float, float, float]

_MAGICS = {b"\x89PNG\r\n\x1a\n": ".png", b"BM": ".bmp"}


class Entry(NamedTuple):
    """One image of a source. `part`, `offset` and `length` are the source's own way back to its bytes."""

    identity: str
    name: str  #: unique within the identity, with the suffix of the image file
    part: str  #: file or folder of the source that holds it; few distinct values, many images share one
    offset: int  #: place in the part
    length: int  #: bytes in the part
    check: int = 0  #: 32 bits that change when the image does: a CRC, a time of modification
    landmarks: Landmarks | None = None

    @property
    def key(self) -> str:
        """`identity/name`."""
        return f"{self.identity}/{self.name}"


class Source(Protocol):
    """A collection of labelled image files. Making one is cheap; `entries` walks through all of it."""

    def entries(self) -> Iterator[Entry]:
        """Every image, in any order.

        Raises:
            DataError: the collection is damaged, unsafe, or not of this layout.
        """
        ...

    def read(self, entry: Entry) -> bytes:
        """The bytes of one image file, from an entry of `entries`, perhaps made by another process.

        Safe to call from several threads.

        Raises:
            DataError: they cannot be read, or are not what the collection says they are.
        """
        ...


def size_of_file(path: Path) -> int:
    """Bytes of a file; -1 where none can be seen, such as at the end of a broken link."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def entry_of_path(path: str, *, source: str, folder_of: dict[str, str]) -> tuple[str, str, str] | None:
    """(identity, name, folder) of an image at `identity/image.jpg`; None for a file that is no image.

    The identity is the folder that holds the image, so one or more folders around all identities do not matter.

    Args:
        path: of the file, relative to the source.
        source: for messages.
        folder_of: identity -> folder, of the paths so far; empty at the first, and filled here.

    Raises:
        DataError: the path leads out of the source, the image lies in no folder, or its identity has another one too.
    """
    pure = PurePosixPath(path)
    if pure.suffix.lower() not in IMAGE_SUFFIXES or pure.name.startswith("."):
        return None
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise DataError(f"{source}: the member {path!r} leads out of the collection; it is refused as unsafe.")
    if len(pure.parts) < 2:
        raise DataError(f"{source}: {path!r} lies in no identity folder; the layout is identity/image.jpg.")
    identity, folder = pure.parts[-2], str(pure.parent)
    known = folder_of.setdefault(identity, folder)
    if known != folder:
        raise DataError(
            f"{source}: the folders {known!r} and {folder!r} would be one identity, {identity!r}; the layout is "
            "identity/image.jpg. Rename one of the two, move the images of identity/session/image.jpg up to their "
            "person, or give `aroface pack` the folders around as sources of their own, which stay apart until --merge "
            "tells who is one person."
        )
    return identity, pure.name, folder


def suffix_of_bytes(data: bytes | memoryview) -> str | None:
    """`.jpg`, `.png`, `.bmp` or `.webp` from the first bytes of an image file; None for anything else."""
    head = bytes(data[:12])
    if head.startswith(b"\xff\xd8\xff"):  # nearly all
        return ".jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGICS.items() if head.startswith(magic)), None)
