"""One or many `.tar` files of `identity/image.jpg`, read in place."""

from collections.abc import Iterator
from pathlib import Path

from aroface.errors import DataError
from shards.sources.base import MAX_IMAGE_BYTES, Entry, entry_of_path
from shards.sources.in_place import OpenFiles
from shards.tar_reader import tar_members

__all__ = ["TarSource", "read_tar_range", "tar_names"]


class TarSource:
    """Images inside one tar, or inside all tars of a folder. Compressed tars are refused."""

    def __init__(self, path: Path) -> None:
        self._folder, self._names = tar_names(path)
        self._files = OpenFiles(self._folder)

    def entries(self) -> Iterator[Entry]:
        """Every image. A link to an image is refused: its bytes lie somewhere else."""
        folder_of: dict[str, str] = {}
        for archive in self._names:
            path = self._folder / archive
            for member in tar_members(path):
                found = entry_of_path(member.name.removeprefix("./"), source=str(path), folder_of=folder_of)
                if found is None:
                    continue
                if not member.is_file:
                    raise DataError(f"{path}: {member.name} is a link; store the image itself (tar --dereference).")
                yield Entry(found[0], found[1], archive, member.offset, member.size)

    def read(self, entry: Entry) -> bytes:
        """The bytes of one member."""
        return read_tar_range(self._files, self._folder, entry)


def tar_names(path: Path) -> tuple[Path, list[str]]:
    """Folder and names of the tars that a path stands for."""
    if path.is_dir():
        return path, sorted(p.name for p in path.glob("*.tar"))
    return path.parent, [path.name]


def read_tar_range(files: OpenFiles, folder: Path, entry: Entry) -> bytes:
    """The bytes of a member.

    Raises:
        DataError: the file became shorter, or the member is too large for a face.
    """
    if entry.length > MAX_IMAGE_BYTES:
        raise DataError(f"{folder / entry.part}: {entry.key} has {entry.length} bytes, over the limit for a face.")
    data = files.read(entry.part, entry.offset, entry.length)
    if len(data) != entry.length:
        raise DataError(f"{folder / entry.part}: {entry.key} is cut short. Copy the archive again.")
    return data
