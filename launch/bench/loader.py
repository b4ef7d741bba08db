"""Shards against the usual ways: reading, packing, memory while packing, opening 12 million samples.

The images of --data are repeated to --images, written as RecordIO and packed. Reading ends where a batch is in the
training process; a ratio counts images per CPU-second, worker processes and threads included, the variants in turn in
one run. Decoding alone is the limit of reading: every image through libjpeg-turbo once. Packing is held against copying
the same image bytes and decoding their headers, in one process.
"""

import argparse
import io
import logging
import multiprocessing
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from launch.bench.measure import Measurement, PeakMemory, interleave, ratio
from launch.bench.output import Report, measured
from launch.outputs import output_file

if TYPE_CHECKING:
    import torch

_PACKAGES = ("numpy", "torch", "simplejpeg", "opencv-python-headless", "pillow", "webdataset")
_LARGE_SET, _LARGE_CLASSES, _SAMPLES_PER_SHARD = 12_000_000, 617_970, 8192
_SYNTHETIC_IDENTITIES, _SYNTHETIC_IMAGES = 100, 10

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--data", type=Path, metavar="PATH", help="faces in any layout (default: drawn ones)")
    parser.add_argument("--images", type=int, default=100_000, metavar="N", help="repeat them to N")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="decoding threads of ours, worker processes of the others (default: the cores)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="counted rounds")
    parser.add_argument(
        "--memory-images",
        type=int,
        default=1_000_000,
        metavar="N",
        help="tiny images to pack for the memory",
    )
    parser.add_argument("--open-images", type=int, default=_LARGE_SET, metavar="N", help="samples of the set to open")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for temporary files (default: the system's)")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = Report("loader", _PACKAGES, settings)
    with tempfile.TemporaryDirectory(prefix="aroface-bench-", dir=args.work) as folder:
        work = Path(folder)
        records = work / "records"
        _write_records(records, _images(args.data, work), args.images)
        _packing(report, records, work, rounds=args.rounds)
        _reading(report, records, work / "shards", args)
        shutil.rmtree(work / "shards")
        _memory(report, work, args.memory_images)
        _opening(report, work / "large", args.open_images)
    report.write(args.out)
    return 0


def _images(data: Path | None, work: Path) -> list[tuple[bytes, int]]:
    """Image files with labels."""
    from shards.pack import read_table
    from shards.sources import open_source

    if data is None:
        from shards.synthetic import write_synthetic

        data = work / "drawn"
        write_synthetic(data, identities=_SYNTHETIC_IDENTITIES, images_per_identity=_SYNTHETIC_IMAGES, seed=0)
    table, source = read_table([data]), open_source(data)
    rows = np.arange(len(table))
    return [
        (source.read(entry), label)
        for (_, _, entry), label in zip(table.entries(rows), table.identity.tolist(), strict=True)
    ]


def _write_records(folder: Path, images: list[tuple[bytes, int]], count: int) -> None:
    from launch.bench.records import MAGIC, RecordWriter

    classes = max(label for _, label in images) + 1
    magic = struct.pack("<I", MAGIC)
    with RecordWriter(folder, classes=classes) as writer:
        usable = [(image, label) for image, label in images if magic not in image]
        for number in range(count):
            writer.add(*usable[number % len(usable)])


def _packing(report: Report, records: Path, work: Path, *, rounds: int) -> None:
    """Ours, and two ways to copy; leaves the shards behind."""
    from shards.pack import PackOptions, pack

    out = work / "shards"

    def ours() -> int:
        shutil.rmtree(out, ignore_errors=True)
        return pack(records, out, PackOptions(), workers=1).num_samples

    def copy(read_header: Callable[[bytes], object]) -> int:
        return _copy(records / "train.rec", work / "copy", read_header)

    ours_, fast, plain = _interleaved(
        {
            "pack": ours,
            "copy, headers with libjpeg-turbo": lambda: copy(_header_turbo),
            "copy, headers with Pillow": lambda: copy(_header_pillow),
        },
        rounds,
    )
    (work / "copy").unlink()
    report.details["packing"] = {m.name: measured(m) for m in (ours_, fast, plain)}
    limit = fast.items_per_cpu_s  # every packer copies, and looks at the images
    report.add("pack, one process", ours_.items_per_cpu_s, "images per CPU-second", limit=limit, higher_is_better=True)
    report.add("pack / copy + header (libjpeg-turbo), CPU time", ratio(ours_, fast), "x", at_least=0.5)
    report.add("pack / copy + header (libjpeg-turbo), wall time", _wall_ratio(ours_, fast), "x")
    report.add("pack / copy + header (Pillow), CPU time", ratio(ours_, plain), "x", at_least=0.5)


def _copy(source: Path, target: Path, read_header: Callable[[bytes], object]) -> int:
    count = 0
    with source.open("rb") as file, target.open("wb") as out:
        while frame := file.read(32):
            length = struct.unpack_from("<2I", frame)[1] - 24
            image = file.read(length)
            file.read(-(length + 24) % 4)
            read_header(image)
            out.write(image)
            count += 1
        out.flush()
        os.fsync(out.fileno())  # as pack does
    return count


def _header_turbo(image: bytes) -> object:
    import simplejpeg

    return simplejpeg.decode_jpeg_header(image) if image[:3] == b"\xff\xd8\xff" else _header_pillow(image)


def _header_pillow(image: bytes) -> object:
    from PIL import Image

    return Image.open(io.BytesIO(image)).size


def _reading(report: Report, records: Path, shards: Path, args: argparse.Namespace) -> None:
    from launch.bench.peers import arcface_batches, webdataset_batches
    from shards.dataset import ShardDataset

    tars = sorted(shards.glob("*.tar"))
    batch, workers = args.batch_size, args.workers

    def ours() -> int:
        data = ShardDataset(shards, image_size=112, workers=workers)
        return _drain(
            found.images
            for found in data.batches(
                seed=1,
                start_position=0,
                num_batches=data.num_samples // batch,
                batch_size=batch,
                rank=0,
                world_size=1,
            )
        )

    variants: dict[str, Callable[[], int]] = {
        "aroface": ours,
        "arcface_torch, OpenCV": lambda: _drain(
            b[0] for b in arcface_batches(records, batch_size=batch, workers=workers)
        ),
        "arcface_torch, PIL": lambda: _drain(
            b[0] for b in arcface_batches(records, batch_size=batch, workers=workers, decoder="pil")
        ),
        "decode alone": lambda: _decode_all(shards),
        "webdataset": lambda: _drain(b[0] for b in webdataset_batches(tars, batch_size=batch, workers=workers)),
    }
    found = _interleaved(variants, args.rounds)
    report.details["reading"] = {m.name: measured(m) for m in found}
    alone = next(m for m in found if m.name == "decode alone")
    for m in found:
        limit = None if m is alone else alone.items_per_cpu_s
        unit = "images per CPU-second"
        report.add(f"read with {m.name}", m.items_per_cpu_s, unit, limit=limit, higher_is_better=True)
    for measurement, goal in zip(found[1:], (5, 5, None, 6), strict=True):
        report.add(f"aroface / {measurement.name}, CPU time", ratio(found[0], measurement), "x", at_least=goal)
        report.add(f"aroface / {measurement.name}, wall time", _wall_ratio(found[0], measurement), "x")


def _decode_all(shards: Path) -> int:
    """The limit: every image through libjpeg-turbo once, in the order of the tars, in this thread."""
    from aroface.images import decode_rgb
    from shards.dataset import ShardDataset

    data = ShardDataset(shards, image_size=112)
    for sample in range(data.num_samples):
        decode_rgb(data.read(sample)[0])
    return data.num_samples


def _drain(batches: Iterable["torch.Tensor"]) -> int:
    return sum(batch.shape[0] for batch in batches)


def _interleaved(variants: dict[str, Callable[[], int]], rounds: int) -> list[Measurement]:
    return interleave(variants, rounds=rounds, on_round=lambda name, number: logger.info("round %d: %s", number, name))


def _wall_ratio(faster: Measurement, slower: Measurement) -> float:
    return faster.items_per_s / slower.items_per_s


def _memory(report: Report, work: Path, images: int) -> None:
    """Peak of a packing process at three sizes, and the line through them."""
    sizes = [images // 4, images // 2, images]
    peaks = []
    for size in sizes:
        logger.info("memory: packing %d tiny images", size)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks.append(pool.submit(_peak_of_packing, work / f"tiny-{size}", size).result())
        shutil.rmtree(work / f"tiny-{size}")
    slope, base = np.polyfit(sizes, peaks, 1)
    report.details["packing_memory"] = {"images": sizes, "peak_bytes": peaks, "bytes_per_image": float(slope)}
    for size, peak in zip(sizes, peaks, strict=True):
        report.add(f"pack {size:,} images, peak memory", peak / 2**20, "MiB")
    report.add("pack, memory per image", slope, "bytes")
    total = (base + slope * _LARGE_SET) / 2**30
    report.add(f"pack {_LARGE_SET:,} images: {base / 2**20:.0f} MiB + {slope:.0f} B each", total, "GiB", at_most=1)


def _peak_of_packing(folder: Path, images: int) -> int:
    """Pack images that all differ, 20 per identity; returns the peak of the own memory in bytes."""
    from aroface.images import encode_jpeg
    from launch.bench.records import RecordWriter
    from shards.pack import PackOptions, pack

    tiny = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    with RecordWriter(folder / "records", classes=images // 20 + 1) as writer:
        for number in range(images):
            writer.add(tiny[:-2] + b"%08d" % number + tiny[-2:], number // 20)
    with PeakMemory() as peak:
        pack(folder / "records", folder / "shards", PackOptions(samples_per_shard=_SAMPLES_PER_SHARD), workers=1)
    return peak.bytes


def _opening(report: Report, folder: Path, samples: int) -> None:
    """Time to open a shard directory whose tars are holes, in each order."""
    from aroface.config.data import BalancedOrder, BlockOrder, OrderConfig, RandomOrder, WeightedOrder
    from shards.dataset import ShardDataset

    logger.info("open: writing the indices of %d samples", samples)
    _write_hollow(folder, samples)
    orders: tuple[OrderConfig, ...] = (RandomOrder(), BlockOrder(), BalancedOrder(), WeightedOrder())
    for order in orders:
        start = perf_counter()
        data = ShardDataset(folder, image_size=112, order=order)
        seconds = perf_counter() - start
        report.add(f"open {samples:,} samples, {order.kind} order", seconds, "s", at_most=1)
        start = perf_counter()
        data.samples_at(np.arange(512) * 8 + samples // 2, seed=1)
        report.add(f"order of a batch of 512, {order.kind} order", 1e3 * (perf_counter() - start), "ms")


def _write_hollow(folder: Path, samples: int) -> None:
    from aroface.files import write_json
    from shards.manifest import MANIFEST_NAME, Identity, Manifest, ShardEntry, write_identities, write_index
    from shards.shard_writer import shard_name

    folder.mkdir(parents=True)
    classes = min(_LARGE_CLASSES, samples)
    labels = np.random.default_rng(0).permutation(np.arange(samples, dtype=np.int32) % classes)
    entries, digest, step = [], "0" * 64, 7168
    for shard, first in enumerate(range(0, samples, _SAMPLES_PER_SHARD)):
        count = min(_SAMPLES_PER_SHARD, samples - first)
        name = shard_name(shard)
        with (folder / f"{name}.tar").open("wb") as file:
            file.truncate(count * step)
        places, lengths = np.arange(count) * step + 512, np.full(count, 5400)
        own = labels[first : first + count]
        write_index(folder / f"{name}.idx", places, lengths, own, tar_bytes=count * step, tar_sha256=digest)
        entries.append(ShardEntry(name=f"{name}.tar", samples=count, bytes=count * step, sha256=digest))
    names = [Identity(number, f"id{number}", samples // classes) for number in range(classes)]
    manifest = Manifest(
        num_samples=samples,
        num_classes=classes,
        image_size=(112, 112),
        source="synthetic",
        licence="none",
        skipped=0,
        identities_sha256=write_identities(folder, names),
        shards=entries,
    )
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
