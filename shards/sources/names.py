"""What counts as an image of an identity, by its path. Shared by every layout that has file names."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from aroface.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "group_by_identity"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def group_by_identity(names: Iterable[str], *, source: str) -> list[tuple[str, str, str]]:
    """(identity, key, name) of every image among `names`, sorted; other files are passed over.

    The identity is the folder that holds the image, so one or more folders around all identities do not matter. The
    key is `identity/image.ext`.

    Raises:
        DataError: a name leads out of the source, an image lies in no folder, two images share a key, or none is left.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise DataError(f"{source}: the member {name!r} leads out of the collection; it is refused as unsafe.")
        if len(path.parts) < 2:
            raise DataError(f"{source}: {name!r} lies in no identity folder; the layout is identity/image.jpg.")
        identity = path.parts[-2]
        key = f"{identity}/{path.name}"
        if key in found:
            raise DataError(f"{source}: {found[key][2]!r} and {name!r} would both be image {key!r}; rename one folder.")
        found[key] = (identity, key, name)
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{source} holds no images of the form identity/image.jpg ({kinds}).")
    return sorted(found.values())
