"""Check a shard directory against its manifest: every byte hashed, every image decoded, every label compared."""

import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aroface.errors import DataError
from aroface.files import sha256_of
from aroface.images import decode_rgb
from shards.manifest import (
    Index,
    Manifest,
    ShardEntry,
    read_identities,
    read_index,
    read_manifest,
)

__all__ = ["Verification", "verify"]


@dataclass
class Verification:
    """What was looked at and what is wrong with it; nothing is wrong when `problems` is empty."""

    samples: int = 0
    shards: int = 0
    problems: list[str] = field(default_factory=list)  #: one line each, beginning with the file and, if any, the key


def verify(directory: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Read the whole of a shard directory and list every fault, instead of stopping at the first.

    Args:
        directory: written by `aroface pack`.
        progress: called with (samples expected so far, samples in all) after each shard.

    Raises:
        DataError: there is no readable manifest, so that nothing can be compared.
    """
    manifest = read_manifest(directory)
    result = Verification(shards=len(manifest.shards))
    images: Counter[int] = Counter()
    done = 0
    for entry in manifest.shards:
        _verify_shard(directory, entry, manifest, images, result)
        done += entry.samples
        progress(done, manifest.num_samples)
    if done != manifest.num_samples:
        result.problems.append(f"manifest.json: {manifest.num_samples} samples, but its shards add up to {done}.")
    _verify_identities(directory, manifest, images, result)
    return result


def _verify_shard(
    directory: Path, entry: ShardEntry, manifest: Manifest, images: Counter[int], result: Verification
) -> None:
    path = directory / entry.name
    if not path.is_file():
        result.problems.append(f"{entry.name}: missing.")
        return
    size = path.stat().st_size
    if size != entry.bytes:
        result.problems.append(f"{entry.name}: {size} bytes, the manifest says {entry.bytes}.")
    elif sha256_of(path) != entry.sha256:
        result.problems.append(f"{entry.name}: its SHA-256 differs from the manifest's; bytes were changed.")
    index: Index | None = None
    try:
        index = read_index(path.with_suffix(".idx"), entry=entry)
    except DataError as error:
        result.problems.append(str(error))
    _verify_members(path, entry, index, manifest.num_classes, images, result)


def _verify_members(
    path: Path, entry: ShardEntry, index: Index | None, num_classes: int, images: Counter[int], result: Verification
) -> None:
    problems = result.problems
    row = 0
    image: tarfile.TarInfo | None = None
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                data = b"" if stream is None else stream.read()
                where = f"{entry.name}: {member.name}"
                if not member.name.endswith(".cls"):
                    image = member
                    _try_decode(data, where, problems)
                    continue
                label = int(data) if data.isdigit() else -1
                if not 0 <= label < num_classes:
                    problems.append(f"{where}: label {data[:20]!r} is outside [0, {num_classes}).")
                images[label] += 1
                if index is not None and image is not None and row < entry.samples:
                    found = (image.offset_data, image.size, label)
                    told = (int(index.offset[row]), int(index.length[row]), int(index.label[row]))
                    if found != told:
                        problems.append(f"{where}: offset, length, label are {found}, the index says {told}.")
                row += 1
    except (tarfile.TarError, OSError) as error:
        last = image.name if image is not None else "the first sample"
        problems.append(f"{entry.name}: {last}: the tar cannot be read from here on ({error}).")
    if row != entry.samples:
        problems.append(f"{entry.name}: {row} whole samples, the manifest says {entry.samples}.")
    result.samples += row


def _try_decode(data: bytes, where: str, problems: list[str]) -> None:
    try:
        decode_rgb(data, name=where)
    except DataError as error:
        problems.append(str(error))


def _verify_identities(directory: Path, manifest: Manifest, images: Counter[int], result: Verification) -> None:
    try:
        identities = read_identities(directory)
    except DataError as error:
        result.problems.append(str(error))
        return
    if len(identities) != manifest.num_classes:
        result.problems.append(
            f"identities.csv: {len(identities)} identities, the manifest says {manifest.num_classes} classes."
        )
    for identity in identities:
        if images[identity.class_index] != identity.images:
            result.problems.append(
                f"identities.csv: {identity.name} has {identity.images} images, the shards hold "
                f"{images[identity.class_index]}."
            )
