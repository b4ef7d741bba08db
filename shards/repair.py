"""A clean copy of a damaged shard directory: what can be read goes in, what cannot is listed with its reason.

What tells a good sample from a bad one is the decoder, the label and, where bytes of a shard were changed, the index: a
flipped byte that leaves a JPEG readable cannot be told from a good image and stays.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from aroface.errors import DataError
from aroface.files import new_directory, sha256_of, write_csv, write_json
from aroface.images import decode_rgb
from shards.manifest import (
    IDENTITIES_NAME,
    MANIFEST_NAME,
    Identity,
    Index,
    Manifest,
    ShardEntry,
    read_identities,
    read_index,
    read_manifest,
    write_identities,
)
from shards.shard_writer import write_shard
from shards.verify import StoredSample, stored_samples

__all__ = ["DROPPED_NAME", "Repair", "repair"]

DROPPED_NAME = "dropped.csv"


@dataclass
class Repair:
    """What became of a directory."""

    manifest: Manifest
    dropped: list[tuple[str, str, str]] = field(default_factory=list)  #: (shard, key or empty, reason)
    lost: int = 0  #: images that the copy lacks
    lost_identities: int = 0  #: classes that lost all their images
    is_counted: bool = True  #: by the old manifest; without one, more may be lost than the indices tell
    renumbered: int = 0  #: classes that got another index because others lost all their images
    names_from_keys: int = 0  #: classes whose name was taken from the keys of their images
    names_lost: int = 0  #: classes that are called class_XXXXXXXX because nothing tells their name


def repair(
    directory: Path, out: Path, *, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Repair:
    """Write a clean copy; the original is not touched.

    Classes keep their index unless one lost all its images: then the rest are numbered anew without gaps, and
    `identity_map.csv` tells old and new. A name that identities.csv does not tell is taken from the keys of the images,
    which lie in the folder of their identity. Shards keep their names; one without a good sample is left out.

    Args:
        directory: shards, perhaps without some of manifest, identities.csv, indices.
        out: new directory.
        progress: called with (`Read` or `Write`, shards done, shards in all).

    Raises:
        DataError: no shard or no good sample is there, or `out` holds something.
    """
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise DataError(f"{directory} holds no shard (.tar), so there is nothing to repair.")
    new_directory(out, what="Output")
    old = _manifest_or_none(directory)
    told = _told_names(directory)
    salvage = _Salvage(directory, old, told)
    kept = [salvage.samples_of(tar) for tar in _each("Read", tars, progress)]
    counts = Counter(label for samples in kept for _, label in samples)
    if not counts:
        raise DataError(f"{directory}: not one sample could be saved.")
    new_label = {label: index for index, label in enumerate(sorted(counts))}
    entries, sizes = [], set[tuple[int, int]]()
    for tar, samples in zip(_each("Write", tars, progress), kept, strict=True):
        entries += _copy(tar, out, samples, new_label, sizes)
    from_keys = _names_of_keys((s for samples in kept for s in samples), told)
    named = {label: told.get(label) or from_keys.get(label) or f"class_{label:08d}" for label in new_label}
    identities = [Identity(new, named[label], counts[label]) for label, new in new_label.items()]
    manifest = Manifest(
        num_samples=sum(entry.samples for entry in entries),
        num_classes=len(counts),
        image_size=next(iter(sizes)) if len(sizes) == 1 else None,
        aligned_by=old.aligned_by if old else None,
        source=old.source if old else directory.name,
        licence=old.licence if old else "unknown",
        skipped=(old.skipped if old else 0) + salvage.lost,
        identities_sha256=write_identities(out, identities),
        shards=entries,
    )
    write_csv(out / DROPPED_NAME, ("shard", "image", "reason"), salvage.dropped)
    renumbered = _write_map(out, new_label, named)
    write_json(out / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return Repair(
        manifest,
        salvage.dropped,
        lost=salvage.lost,
        lost_identities=(salvage.num_classes or len(counts)) - len(counts),
        is_counted=old is not None,
        renumbered=renumbered,
        names_from_keys=len(from_keys),
        names_lost=len(counts.keys() - told.keys() - from_keys.keys()),
    )


def _each(stage: str, tars: Sequence[Path], progress: Callable[[str, int, int], None]) -> Iterator[Path]:
    for number, tar in enumerate(tars, 1):
        yield tar
        progress(stage, number, len(tars))


def _write_map(out: Path, new_label: dict[int, int], named: dict[int, str]) -> int:
    """Classes with another index than before; if there are any, a list tells old and new."""
    renumbered = sum(label != new for label, new in new_label.items())
    if renumbered:
        rows = [(new, label, named[label]) for label, new in new_label.items()]
        write_csv(out / "identity_map.csv", ("class_index", "old_class_index", "identity"), rows)
    return renumbered


def _manifest_or_none(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except DataError:
        return None


def _count_identities(directory: Path) -> int | None:
    with suppress(DataError):
        return len(read_identities(directory)) or None
    return None


def _told_names(directory: Path) -> dict[int, str]:
    """Names by class index from the lines of identities.csv that can be read and have their class to themselves."""
    found = defaultdict[int, list[str]](list)
    path = directory / IDENTITIES_NAME
    with suppress(OSError, csv.Error), path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.reader(file):
            if len(row) == 3 and row[0].isdecimal() and len(row[0]) < 10 and row[1] and row[2].isdigit():
                found[int(row[0])].append(row[1])
    return {index: names[0] for index, names in found.items() if len(names) == 1}


def _names_of_keys(samples: Iterable[tuple[StoredSample, int]], told: dict[int, str]) -> dict[int, str]:
    """Names of the classes that `told` lacks: the folder of all their images, where no other class is called so."""
    folders = defaultdict[int, set[str]](set)
    for sample, label in samples:
        if label not in told:
            folders[label].add(sample.image.name.rpartition("/")[0])
    names = {label: next(iter(found)) for label, found in folders.items() if len(found) == 1}
    times = Counter([*names.values(), *told.values()])
    return {label: name for label, name in names.items() if name and times[name] == 1}


class _Salvage:
    """Finds the good samples of one shard after the other."""

    def __init__(self, directory: Path, manifest: Manifest | None, names: dict[int, str]) -> None:
        self._entries = {} if manifest is None else {entry.name: entry for entry in manifest.shards}
        self._names = names
        self._seen: set[str] = set()
        self.num_classes = _count_identities(directory) if manifest is None else manifest.num_classes
        self.dropped: list[tuple[str, str, str]] = []
        self.lost = 0
        known = self._entries or (path.with_suffix(".tar").name for path in directory.glob("*.idx"))
        for tar in sorted(directory / name for name in known):
            samples = 0 if tar.is_file() else self._expected(tar, _labels_by_offset(tar, self._entries.get(tar.name)))
            if samples:
                self.dropped.append((tar.name, "", f"the shard is missing, with {samples} samples"))
                self.lost += samples

    def samples_of(self, tar: Path) -> list[tuple[StoredSample, int]]:
        """The good samples of a shard with their labels; the others are listed in `dropped` and counted in `lost`."""
        entry = self._entries.get(tar.name)
        labels = _labels_by_offset(tar, entry)
        is_untouched = entry is not None and tar.stat().st_size == entry.bytes and sha256_of(tar) == entry.sha256
        good: list[tuple[StoredSample, int]] = []
        found: set[int] = set()  # offsets of whole images, good or not
        try:
            with tar.open("rb") as file:
                for sample in stored_samples(tar, on_damage=lambda text: self.dropped.append((tar.name, "", text))):
                    found.add(sample.image.offset)
                    file.seek(sample.image.offset)
                    data = file.read(sample.image.size)
                    told = labels.get(sample.image.offset) if entry else None  # else nothing ties the index to the tar
                    reason, label = self._judge(sample, data, _label_in(tar, sample), told, is_untouched=is_untouched)
                    if reason:
                        self.dropped.append((tar.name, sample.image.name, reason))
                    else:
                        good.append((sample, label))
        except DataError as error:
            self.dropped.append((tar.name, "", str(error)))
        self.lost += max(self._expected(tar, labels), len(found)) - len(good)
        self._list_gone(tar, labels, found)
        return good

    def _expected(self, tar: Path, labels: dict[int, int]) -> int:
        """Samples that a shard had by the manifest; without one, by its index."""
        entry = self._entries.get(tar.name)
        return len(labels) if entry is None else entry.samples

    def _list_gone(self, tar: Path, labels: dict[int, int], found: set[int]) -> None:
        """Images that were not found in the tar, one by one where the index tells which they are."""
        expected = self._expected(tar, labels)
        gone = [(row, label) for row, (offset, label) in enumerate(labels.items(), 1) if offset not in found]
        if len(gone) == expected - len(found):
            names = ((row, self._names.get(label, f"class {label}")) for row, label in gone)
            self.dropped += [
                (tar.name, "", f"image {row} of {expected} is gone; it was of {name}") for row, name in names
            ]
        elif len(found) < expected:
            self.dropped.append((tar.name, "", f"{expected - len(found)} of {expected} images are gone"))

    def _judge(
        self, sample: StoredSample, data: bytes, stored: int | None, told: int | None, *, is_untouched: bool
    ) -> tuple[str, int]:
        """Why a sample is dropped (empty: it is good), and its label."""
        label = stored if stored is not None else told
        if not sample.image.is_file or ".." in sample.image.name.split("/") or sample.image.name.startswith("/"):
            return "a link, or a name that leads out of the shard", -1
        if sample.image.name in self._seen:
            return "its key comes a second time", -1
        if label is None:
            return "no readable label in the tar or in the index", -1
        if stored is not None and told is not None and stored != told and not is_untouched:
            return f"label {stored} in the tar, {told} in the index", -1
        if label < 0 or (self.num_classes is not None and label >= self.num_classes):
            return f"label {label} is outside [0, {self.num_classes})", -1
        try:
            decode_rgb(data, name="image")
        except DataError as error:
            return str(error), -1
        self._seen.add(sample.image.name)
        return "", label


def _labels_by_offset(tar: Path, entry: ShardEntry | None) -> dict[int, int]:
    """Label by offset of the image, from the index of a shard; empty where it is damaged or belongs to another one."""
    try:
        index: Index = read_index(tar.with_suffix(".idx"), entry=entry)
    except DataError:
        return {}
    return dict(zip(index.offset.tolist(), index.label.tolist(), strict=True))


def _label_in(tar: Path, sample: StoredSample) -> int | None:
    if sample.label is None or not 0 < sample.label.size < 10:
        return None
    with tar.open("rb") as file:
        file.seek(sample.label.offset)
        text = file.read(sample.label.size)
    return int(text) if text.isdigit() else None


def _copy(
    tar: Path,
    out: Path,
    samples: list[tuple[StoredSample, int]],
    new_label: dict[int, int],
    sizes: set[tuple[int, int]],
) -> list[ShardEntry]:
    """The entry of the copy of a shard; none where it had no good sample."""
    with tar.open("rb") as file, write_shard(out, tar.stem) as writer:
        for sample, label in samples:
            file.seek(sample.image.offset)
            data = file.read(sample.image.size)
            height, width, _ = decode_rgb(data).shape
            sizes.add((width, height))
            writer.add(sample.image.name, data, new_label[label])
    return [writer.entry] if writer.entry else []
