"""Is anybody of a test set in the training set too? Then the numbers say less than they seem to."""

import argparse
from collections.abc import Iterable
from pathlib import Path

__all__ = ["add_trained_on", "overlap_warnings"]

_NAMED = 3


def add_trained_on(parser: "argparse._ActionsContainer") -> None:
    """Declare --trained-on."""
    parser.add_argument(
        "--trained-on",
        type=Path,
        metavar="SHARDS",
        help="packed training set: people that it shares with the test, by the names of their folders, are told",
    )


def overlap_warnings(args: argparse.Namespace, identities: Iterable[str]) -> list[str]:
    """One warning where people of the test are in the training set of --trained-on; none without the option.

    Raises:
        DataError: --trained-on is no packed set.
    """
    if args.trained_on is None:
        return []
    from shards.manifest import read_identities

    tested = set(identities)
    shared = sorted(tested & {identity.name for identity in read_identities(args.trained_on)})
    if not shared:
        return []
    named = ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
    return [
        f"{len(shared)} of {len(tested)} people are in the training set {args.trained_on} too ({named}): people that a "
        "model was trained on are no test of it. Pack the training set without them."
    ]
