"""Check a shard directory: decode every image, compare every hash, count and label with the manifest.

Exit code 2 and one line per fault, naming shard and key, when anything is wrong.
"""

import argparse
import logging
from pathlib import Path

from aroface.errors import DataError

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aroface verify`."""
    parser.add_argument("shards", type=Path, help="directory written by `aroface pack`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Verify and print the faults."""
    from dataclasses import asdict

    from aroface.files import write_json
    from shards.verify import verify

    result = verify(args.shards, progress=_log_progress)
    if args.out is not None:
        write_json(args.out, asdict(result))
    if not result.problems:
        print(f"{args.shards}: {result.samples:,} samples in {result.shards} shards, all as the manifest says.")
        return 0
    for problem in result.problems[:_SHOWN_PROBLEMS]:
        print(problem)
    if len(result.problems) > _SHOWN_PROBLEMS:
        print(f"... and {len(result.problems) - _SHOWN_PROBLEMS} more (--out FILE lists all).")
    raise DataError(
        f"{args.shards} has {len(result.problems)} fault(s). Copy it again from a good copy, or pack again."
    )


def _log_progress(done: int, total: int) -> None:
    logger.info("Verified %s of %s samples.", f"{done:,}", f"{total:,}")
