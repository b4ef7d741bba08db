"""Check a shard directory against its manifest: every byte hashed, every image decoded, every label compared."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import simplejpeg

from aroface.errors import DataError
from aroface.files import sha256_of
from aroface.images import decode_rgb
from shards.manifest import (
    IDENTITIES_NAME,
    MANIFEST_NAME,
    Index,
    Manifest,
    ShardEntry,
    read_identities,
    read_index,
    read_manifest,
)
from shards.tar_reader import TarMember, tar_members

__all__ = ["Finding", "Kind", "StoredSample", "Verification", "stored_samples", "verify"]

Kind = Literal["missing", "size", "hash", "index", "tar", "image", "label", "count", "identities", "colour", "unknown"]

#: What lies beside the shards and is no fault.
_KNOWN_NAMES = frozenset(
    {
        MANIFEST_NAME,
        IDENTITIES_NAME,
        "identity_map.csv",
        "skipped.csv",
        "duplicates.csv",
        "dropped.csv",
        "summary.html",
        "summary.json",
    }
)


@dataclass(frozen=True)
class Finding:
    """One thing that was found; its text begins with the file and, if any, the key."""

    kind: Kind
    shard: str | None
    key: str | None
    text: str


@dataclass
class Verification:
    """What was looked at; nothing is wrong when `faults` is empty. `notes` may be as they are meant to be."""

    samples: int = 0
    shards: int = 0
    faults: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """The texts of the faults."""
        return [fault.text for fault in self.faults]


class StoredSample(NamedTuple):
    """One image of a tar and the label that follows it."""

    image: TarMember
    label: TarMember | None


def stored_samples(path: Path, *, on_damage: Callable[[str], None]) -> Iterator[StoredSample]:
    """Images of a tar with their labels, also behind damaged places.

    Args:
        path: of the tar.
        on_damage: told of every place that is no tar, and of members without partner.
    """
    image: TarMember | None = None
    for member in tar_members(path, on_damage=on_damage):
        stem, _, suffix = member.name.rpartition(".")
        if suffix != "cls":
            if image is not None:
                yield StoredSample(image, None)
            image = member
        elif image is not None and image.name.rpartition(".")[0] == stem:
            yield StoredSample(image, member)
            image = None
        else:
            on_damage(f"{path.name}: {member.name}: a label without an image.")
    if image is not None:
        yield StoredSample(image, None)


def verify(
    directory: Path, *, workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Read the whole of a shard directory and list every fault, instead of stopping at the first.

    Args:
        directory: written by `aroface pack`.
        workers: threads; the decoder releases the interpreter lock.
        progress: called with (samples expected so far, samples in all) after each shard.

    Raises:
        DataError: there is no readable manifest, so that nothing can be compared.
    """
    manifest = read_manifest(directory)
    result = Verification(shards=len(manifest.shards))
    images: Counter[int] = Counter()
    done = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        checks = pool.map(lambda entry: _ShardCheck(directory, entry, manifest).run(), manifest.shards)
        for check, entry in zip(checks, manifest.shards, strict=True):
            result.faults += check.faults
            result.notes += check.notes
            result.samples += check.samples
            images.update(check.images)
            done += entry.samples
            progress(done, manifest.num_samples)
    if done != manifest.num_samples:
        text = f"{MANIFEST_NAME}: {manifest.num_samples} samples, but its shards add up to {done}."
        result.faults.append(Finding("count", None, None, text))
    _check_identities(directory, manifest, images, result)
    _note_unknown_files(directory, manifest, result)
    return result


class _ShardCheck:
    """The findings of one shard."""

    def __init__(self, directory: Path, entry: ShardEntry, manifest: Manifest) -> None:
        self._path = directory / entry.name
        self._entry = entry
        self._manifest = manifest
        self.faults: list[Finding] = []
        self.notes: list[Finding] = []
        self.images: Counter[int] = Counter()
        self.samples = 0

    def run(self) -> "_ShardCheck":
        """Look at everything; returns self."""
        if not self._path.is_file():
            self._fault("missing", f"{self._entry.name}: missing.")
            return self
        size = self._path.stat().st_size
        if size != self._entry.bytes:
            self._fault("size", f"{self._entry.name}: {size} bytes, the manifest says {self._entry.bytes}.")
        elif sha256_of(self._path) != self._entry.sha256:
            self._fault("hash", f"{self._entry.name}: its SHA-256 differs from the manifest's; bytes were changed.")
        index: Index | None = None
        try:
            index = read_index(self._path.with_suffix(".idx"), entry=self._entry)
        except DataError as error:
            self._fault("index", str(error))
        try:
            self._check_samples(index)
        except (DataError, OSError) as error:
            self._fault("tar", f"{self._entry.name}: cannot be read ({error}).")
        if self.samples != self._entry.samples:
            self._fault(
                "count", f"{self._entry.name}: {self.samples} whole samples, the manifest says {self._entry.samples}."
            )
        return self

    def _fault(self, kind: Kind, text: str, key: str | None = None) -> None:
        self.faults.append(Finding(kind, self._entry.name, key, text))

    def _check_samples(self, index: Index | None) -> None:
        with self._path.open("rb") as file:
            for row, (image, label) in enumerate(
                stored_samples(self._path, on_damage=lambda text: self._fault("tar", text))
            ):
                file.seek(image.offset)
                self._check_image(image.name, file.read(image.size))
                where = f"{self._entry.name}: {image.name}"
                if label is None:
                    self._fault("label", f"{where} has no label (.cls).", image.name)
                    continue
                self.samples += 1
                file.seek(label.offset)
                number = self._check_label(file.read(min(label.size, 100)), label.name)
                found = (image.offset, image.size, number)
                if index is not None and row < self._entry.samples:
                    told = (int(index.offset[row]), int(index.length[row]), int(index.label[row]))
                    if found != told:
                        text = f"{where}: offset, length, label are {found}, the index says {told}."
                        self._fault("index", text, image.name)

    def _check_label(self, data: bytes, name: str) -> int:
        number = int(data) if data.isdigit() and len(data) < 10 else -1
        if not 0 <= number < self._manifest.num_classes:
            text = f"{self._entry.name}: {name}: label {data[:20]!r} is outside [0, {self._manifest.num_classes})."
            self._fault("label", text, name)
        self.images[number] += 1
        return number

    def _check_image(self, name: str, data: bytes) -> None:
        where = f"{self._entry.name}: {name}"
        try:
            height, width, _ = decode_rgb(data, name=where).shape
        except DataError as error:
            self._fault("image", str(error), name)
            return
        told = self._manifest.image_size
        if told is not None and (width, height) != tuple(told):
            text = f"{where}: {width} x {height} pixels, the manifest says {told[0]} x {told[1]}."
            self._fault("image", text, name)
        colour = _unusual_colour(data)
        if colour is not None:
            self.notes.append(Finding("colour", self._entry.name, name, f"{where}: {colour}; it is read as RGB."))


def _unusual_colour(data: bytes) -> str | None:
    """What an image is when it is not plain colour."""
    if data[:3] == b"\xff\xd8\xff":
        space: str = simplejpeg.decode_jpeg_header(data)[2]
        return {"Gray": "a grey JPEG", "CMYK": "a CMYK JPEG"}.get(space)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return {0: "a grey PNG", 3: "a PNG with a palette", 4: "a grey PNG with alpha", 6: "a PNG with alpha"}.get(
            data[25]
        )
    return None


def _check_identities(directory: Path, manifest: Manifest, images: Counter[int], result: Verification) -> None:
    def fault(text: str, key: str | None = None) -> None:
        result.faults.append(Finding("identities", None, key, text))

    try:
        identities = read_identities(directory)
    except DataError as error:
        fault(str(error))
        return
    told = manifest.identities_sha256
    if told is not None and sha256_of(directory / IDENTITIES_NAME) != told:
        fault(f"{IDENTITIES_NAME}: its SHA-256 differs from the manifest's; bytes were changed.")
    if len(identities) != manifest.num_classes:
        fault(f"{IDENTITIES_NAME}: {len(identities)} identities, the manifest says {manifest.num_classes} classes.")
    for identity in identities:
        if images[identity.class_index] != identity.images:
            fault(
                f"{IDENTITIES_NAME}: {identity.name} has {identity.images} images, the shards hold "
                f"{images[identity.class_index]}.",
                identity.name,
            )


def _note_unknown_files(directory: Path, manifest: Manifest, result: Verification) -> None:
    tars = {entry.name for entry in manifest.shards}
    known = _KNOWN_NAMES | tars | {Path(name).with_suffix(".idx").name for name in tars}
    for path in sorted(directory.iterdir()):
        if path.name not in known:
            result.notes.append(
                Finding("unknown", None, path.name, f"{path.name}: the manifest does not know it; it is never read.")
            )
