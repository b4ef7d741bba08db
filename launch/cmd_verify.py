"""Check a shard directory: decode every image, compare every hash, count and label with the manifest.

Exit code 2 and one line per fault, naming shard and key, when anything is wrong. --repair writes a clean copy of what
can be saved, and dropped.csv with the rest.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import DataError
from launch.outputs import output_file, output_folder

if TYPE_CHECKING:
    from shards.verify import Verification

__all__ = ["add_arguments", "run"]

_SHOWN_PROBLEMS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aroface verify`."""
    parser.add_argument("shards", type=Path, help="directory written by `aroface pack`")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write what was found as JSON")
    parser.add_argument(
        "--repair", type=output_folder, metavar="DIR", help="write a clean copy into this new directory"
    )
    parser.add_argument(
        "--summary", type=output_folder, metavar="DIR", help="write a page about the images into this directory"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: idle cores)")


def run(args: argparse.Namespace) -> int:
    """Verify, or repair, and print what was found."""
    if args.repair is not None:
        return _repair(args.shards, args.repair)
    result = _verify(args)
    for note in result.notes[:_SHOWN_PROBLEMS]:
        print(f"note: {note.text}")
    _print_rest(len(result.notes), "notes")
    if args.summary is not None:
        from shards.summary import write_summary

        print(f"summary: {write_summary(args.shards, args.summary)}")
    if not result.faults:
        print(f"{args.shards}: {result.samples:,} samples in {result.shards} shards, all as the manifest says.")
        return 0
    for fault in result.faults[:_SHOWN_PROBLEMS]:
        print(fault.text)
    _print_rest(len(result.faults), "faults")
    raise DataError(
        f"{args.shards} has {len(result.faults)} fault(s). Copy it again from a good copy, pack again, or save what "
        f"can be saved: aroface verify {args.shards} --repair DIR"
    )


def _print_rest(count: int, what: str) -> None:
    if count > _SHOWN_PROBLEMS:
        print(f"... and {count - _SHOWN_PROBLEMS} more {what} (--out FILE lists all).")


def _verify(args: argparse.Namespace) -> "Verification":
    from dataclasses import asdict

    from aroface.files import write_json
    from launch.progress import StagedProgress
    from launch.threads import free_cores
    from shards.verify import verify

    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers is {args.workers}; it must be 1 or more.")
    with StagedProgress(unit="samples") as progress:
        result = verify(
            args.shards,
            workers=args.workers or free_cores(),
            progress=lambda done, total: progress.update("Verify", done, total),
        )
    if args.out is not None:
        write_json(args.out, asdict(result))
    return result


def _repair(shards: Path, out: Path) -> int:
    from launch.progress import StagedProgress
    from shards.repair import DROPPED_NAME, repair

    with StagedProgress(unit="shards") as progress:
        result = repair(shards, out, progress=progress.update)
    manifest = result.manifest
    print(f"saved    {manifest.num_samples:,} images of {manifest.num_classes:,} identities in {out}")
    lost = f"{result.lost:,} images" + (f", all of {n:,} identities" if (n := result.lost_identities) else "")
    unknown = "" if result.is_counted else "; perhaps more, for no manifest tells how many there were"
    print(f"lost     {lost}{unknown} ({out / DROPPED_NAME})")
    if result.names_from_keys or result.names_lost:
        print(
            f"names    {result.names_from_keys:,} that identities.csv did not tell are the folders of their images, "
            f"{result.names_lost:,} are lost (class_XXXXXXXX)"
        )
    if result.renumbered:
        print(f"renumbered {result.renumbered:,} classes (identity_map.csv): others lost all their images")
    return 0
