"""Pack images into WebDataset shards with manifest and index.

SOURCE is a folder or an archive of identity/image.jpg, a RecordIO set, a list file, or another layout that the training
sets of the field come in (--format lists them); several are packed into one label space. The image bytes are stored
untouched unless --align, --size or --quality ask for a change. A run that was killed continues when the same command is
given again; the result does not depend on the number of workers.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import DataError
from launch.outputs import output_folder

if TYPE_CHECKING:
    from shards.manifest import Manifest
    from shards.pack import PackOptions
    from shards.selection import Part

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aroface pack`."""
    from shards.sources import FORMATS

    parser.add_argument("source", type=Path, nargs="+", metavar="SOURCE", help="one or several, of any format")
    parser.add_argument("out", type=output_folder, metavar="OUT", help="new directory for the shards")
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<10}  {look}" for name, look in FORMATS.items())
    parser.add_argument("--format", choices=FORMATS, metavar="NAME", help="see below (default: detected)")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that paths in a list are relative to (default: its own)"
    )
    parser.add_argument("--label-field", metavar="NAME", help="JSON field or Parquet column with the identity")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--samples-per-shard", type=int, default=8192, metavar="N", help="images in a shard")
    parser.add_argument("--licence", default="unknown", metavar="TEXT", help="licence note kept in the manifest")
    parser.add_argument(
        "--template",
        choices=["arcface_112"],
        default="arcface_112",
        help="how the faces are aligned, kept in the manifest",
    )
    parser.add_argument("--no-summary", action="store_true", help="do not write summary.html, which shows 60 images")
    chosen = parser.add_argument_group("which images")
    chosen.add_argument("--min-images", type=int, default=1, help="leave out identities with fewer")
    chosen.add_argument("--max-bad", type=int, default=0, help="unreadable images to skip at most")
    chosen.add_argument(
        "--identities", type=Path, metavar="FILE", help="keep only these: text file, one identity a line"
    )
    chosen.add_argument(
        "--merge", type=Path, metavar="FILE", help="CSV of identity,person: identities that are one person"
    )
    chosen.add_argument(
        "--duplicates",
        choices=["report", "drop"],
        default="report",
        help="byte-for-byte equal images: list them, or keep one of each and none that two people share",
    )
    chosen.add_argument("--holdout", type=int, default=0, metavar="N", help="set N identities aside")
    chosen.add_argument("--holdout-out", type=output_folder, metavar="DIR", help="their shards (default: OUT-holdout)")
    changed = parser.add_argument_group("changing images")
    changed.add_argument("--align", action="store_true", help="crop by five landmarks to the template")
    changed.add_argument("--landmarks", type=Path, metavar="FILE", help="CSV or JSON by image, where SOURCE has none")
    changed.add_argument("--size", type=int, metavar="PX", help="side of the stored images")
    changed.add_argument("--quality", type=int, metavar="Q", help="encode every image anew as JPEG of this quality")
    changed.add_argument(
        "--check",
        choices=["header", "decode"],
        default="header",
        help="how images that stay as they are get looked at; `aroface verify` decodes all",
    )


def run(args: argparse.Namespace) -> int:
    """Pack and print a summary."""
    if args.holdout_out and not args.holdout:
        raise DataError("--holdout-out needs --holdout N, the number of identities to set aside.")
    print_manifest(_pack(args, args.out, "rest"), args.out)
    if args.holdout:
        out = args.holdout_out or args.out.with_name(f"{args.out.name}-holdout")
        print_manifest(_pack(args, out, "holdout"), out)
    return 0


def _pack(args: argparse.Namespace, out: Path, part: "Part") -> "Manifest":
    from launch.progress import StagedProgress
    from shards.pack import pack
    from shards.summary import write_summary

    with StagedProgress(unit="images") as progress:
        manifest = pack(args.source, out, _options(args, part), workers=args.workers, progress=progress.update)
    if not args.no_summary:
        write_summary(out)
    return manifest


def _options(args: argparse.Namespace, part: "Part") -> "PackOptions":
    from shards.landmark_file import read_landmarks
    from shards.pack import PackOptions
    from shards.prepare import Preparation
    from shards.selection import read_merges
    from shards.sources import SourceOptions

    for option, least, most in (("size", 8, 4096), ("quality", 1, 100)):
        value = getattr(args, option)
        if value is not None and not least <= value <= most:
            raise DataError(f"--{option} is {value}; choose from {least} to {most}.")
    return PackOptions(
        samples_per_shard=args.samples_per_shard,
        min_images=args.min_images,
        max_bad=args.max_bad,
        identities=_read_identities(args.identities) if args.identities else None,
        holdout=args.holdout,
        part=part,
        merges=read_merges(args.merge) if args.merge else {},
        duplicates=args.duplicates,
        preparation=Preparation(align=args.align, size=args.size, quality=args.quality, check=args.check),
        landmarks=read_landmarks(args.landmarks) if args.landmarks else {},
        source=SourceOptions(args.format, args.root, args.label_field),
        licence=args.licence,
        template=args.template,
    )


def print_manifest(manifest: "Manifest", out: Path) -> None:
    """A summary of a shard directory on stdout."""
    size = "mixed sizes" if manifest.image_size is None else "{} x {} px".format(*manifest.image_size)
    rows = [
        ("images", f"{manifest.num_samples:,} ({size})"),
        ("identities", f"{manifest.num_classes:,}"),
        ("shards", f"{len(manifest.shards):,}, {sum(shard.bytes for shard in manifest.shards) / 2**20:,.1f} MiB"),
        ("aligned", "as they came" if manifest.aligned_by is None else f"by {manifest.aligned_by}"),
        ("unreadable, skipped", f"{manifest.skipped:,}{' (skipped.csv)' if manifest.skipped else ''}"),
        ("equal images", f"{manifest.duplicates:,}{' (duplicates.csv)' if manifest.duplicates else ''}"),
        ("of several people", f"{manifest.conflicts:,}"),
        ("written to", str(out)),
        ("page about them", str(out / "summary.html") if (out / "summary.html").is_file() else "-"),
    ]
    for name, value in rows:
        print(f"{name:<20} {value}")


def _read_identities(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"--identities {path} cannot be read: {error}.") from error
    names = tuple(sorted({line.strip() for line in lines} - {""}))
    if not names:
        raise DataError(f"--identities {path} names no identity; write one a line.")
    return names
