"""Existing WebDataset tars of any naming, labelled by `.cls`, `.json` or `.txt` members; also our own shards."""

import json
from collections.abc import Iterator
from pathlib import Path

from aroface.errors import DataError
from shards.manifest import IDENTITIES_NAME, read_identities
from shards.sources.base import IMAGE_SUFFIXES, Entry
from shards.sources.in_place import OpenFiles
from shards.sources.tar_file import read_tar_range, tar_names
from shards.tar_reader import TarMember, tar_members

__all__ = ["LABEL_FIELDS", "WebDatasetSource", "holds_labels"]

#: Fields of a `.json` member that are taken for the identity, first match first.
LABEL_FIELDS = ("identity", "label", "class", "cls", "id", "subject", "person", "name")

_LABEL_SUFFIXES = ("cls", "json", "txt")
_MAX_LABEL_BYTES = 1 << 20
_PEEKED_MEMBERS = 64


class WebDatasetSource:
    """Samples of consecutive members that share a key: one image and one label.

    Number labels become identities of eight digits, so that they keep their order; in a directory with identities.csv
    they become the names it gives.
    """

    def __init__(self, path: Path, *, label_field: str | None = None) -> None:
        self._folder, self._names = tar_names(path)
        self._files = OpenFiles(self._folder)
        self._fields = LABEL_FIELDS if label_field is None else (label_field,)

    def entries(self) -> Iterator[Entry]:
        """Every image with its label."""
        names = None
        if (self._folder / IDENTITIES_NAME).is_file():
            names = [identity.name for identity in read_identities(self._folder)]
        for archive in self._names:
            for key, members in _samples(self._folder / archive):
                yield self._entry(archive, key, members, names)

    def read(self, entry: Entry) -> bytes:
        """The bytes of one image member."""
        return read_tar_range(self._files, self._folder, entry)

    def _entry(self, archive: str, key: str, members: dict[str, TarMember], names: list[str] | None) -> Entry:
        where = f"{self._folder / archive}: sample {key}"
        image = next((suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES), None)
        if image is None:
            raise DataError(f"{where} holds no image (found: {', '.join(members)}).")
        member = members[image]
        if not member.is_file or ".." in key.split("/") or key.startswith("/"):
            raise DataError(f"{where} is a link or leads out of the collection; it is refused as unsafe.")
        identity = self._identity(archive, members, where)
        if names is not None and identity.isdigit():
            if int(identity) >= len(names):
                raise DataError(f"{where}: label {int(identity)} is not in {IDENTITIES_NAME}.")
            identity = names[int(identity)]
        name = key.removeprefix(f"{identity}/").replace("/", "_")
        return Entry(identity, f"{name}.{image}", archive, member.offset, member.size)

    def _identity(self, archive: str, members: dict[str, TarMember], where: str) -> str:
        suffix = next((suffix for suffix in _LABEL_SUFFIXES if suffix in members), None)
        if suffix is None:
            raise DataError(
                f"{where} has no label: a .cls, .json or .txt member is needed (found: {', '.join(members)})."
            )
        member = members[suffix]
        if member.size > _MAX_LABEL_BYTES:
            raise DataError(f"{where}: a label of {member.size} bytes; a class index or a name is expected.")
        try:
            text = self._files.read(archive, member.offset, member.size).decode("utf-8").strip()
            value = self._field(json.loads(text), where) if suffix == "json" else text
        except ValueError as error:  # of decoding or of JSON
            raise DataError(f"{where}: its .{suffix} member cannot be read ({error}).") from error
        if not value or "\n" in value or value in (".", ".."):
            raise DataError(f"{where}: the label {value[:40]!r} is no class index and no name.")
        return f"{int(value):08d}" if value.isdigit() else value.replace("/", "_")

    def _field(self, values: object, where: str) -> str:
        if isinstance(values, dict):
            for field in self._fields:
                if isinstance(values.get(field), str | int):
                    return str(values[field])
        raise DataError(
            f"{where}: its .json member has none of the fields {', '.join(self._fields)}; name yours by --label-field."
        )


def holds_labels(path: Path) -> bool:
    """The first members of the first tar are samples with labels, not just images in folders."""
    folder, names = tar_names(path)
    for number, member in enumerate(tar_members(folder / names[0])):
        if member.name.rpartition(".")[2].lower() in _LABEL_SUFFIXES:
            return True
        if number == _PEEKED_MEMBERS:
            break
    return False


def _samples(path: Path) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Consecutive members whose names agree up to the first dot after the last slash."""
    current: str | None = None
    members: dict[str, TarMember] = {}
    for member in tar_members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        if not stem or not suffix:
            continue
        key = f"{folder}{slash}{stem}"
        if key != current and current is not None:
            yield current, members
            members = {}
        current = key
        members[suffix.lower()] = member
    if current is not None:
        yield current, members
