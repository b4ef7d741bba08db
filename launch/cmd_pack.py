"""Pack images into WebDataset shards with manifest and index.

SOURCE is a folder or .zip of identity/image.jpg. The image bytes are stored untouched. A run that was killed continues
when the same command is given again; the result does not depend on the number of workers.
"""

import argparse
import logging
import os
from pathlib import Path

from aroface.errors import DataError

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aroface pack`."""
    parser.add_argument("source", type=Path, help="folder or .zip of identity/image.jpg")
    parser.add_argument("out", type=Path, help="new directory for the shards")
    parser.add_argument("--format", metavar="NAME", help="layout of SOURCE: folder or zip (default: detected)")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=8192, help="default: %(default)s")
    parser.add_argument(
        "--min-images", type=int, default=1, help="leave out identities with fewer (default: %(default)s)"
    )
    parser.add_argument(
        "--max-bad", type=int, default=0, help="unreadable images to skip at most (default: %(default)s)"
    )
    parser.add_argument("--template", choices=["arcface_112"], default="arcface_112", help="how the faces are aligned")
    parser.add_argument("--licence", default="unknown", metavar="TEXT", help="licence note kept in the manifest")
    parser.add_argument(
        "--identities", type=Path, metavar="FILE", help="keep only these: text file, one identity a line"
    )


def run(args: argparse.Namespace) -> int:
    """Pack and print a summary."""
    from shards.pack import PackOptions, pack

    options = PackOptions(
        samples_per_shard=args.samples_per_shard,
        min_images=args.min_images,
        max_bad=args.max_bad,
        identities=_read_identities(args.identities) if args.identities else None,
        layout=args.format,
        licence=args.licence,
        template=args.template,
    )
    manifest = pack(args.source, args.out, options, workers=args.workers, progress=_log_progress)
    size = "mixed sizes" if manifest.image_size is None else "{} x {} px".format(*manifest.image_size)
    rows = [
        ("images", f"{manifest.num_samples:,} ({size})"),
        ("identities", f"{manifest.num_classes:,}"),
        ("shards", f"{len(manifest.shards):,}, {sum(shard.bytes for shard in manifest.shards) / 2**20:,.1f} MiB"),
        ("unreadable, skipped", f"{manifest.skipped:,}"),
        ("written to", str(args.out)),
    ]
    for name, value in rows:
        print(f"{name:<20} {value}")
    return 0


def _log_progress(done: int, total: int) -> None:
    logger.info("Packed %s of %s images.", f"{done:,}", f"{total:,}")


def _read_identities(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--identities {path} cannot be read: {error}.") from error
    names = tuple(sorted({line.strip() for line in lines} - {""}))
    if not names:
        raise DataError(f"--identities {path} names no identity; write one a line.")
    return names
