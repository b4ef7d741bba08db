"""Look at the checkpoints of a run, check them, and thin them out.

PATH is a run directory, or one of its step-NNNNNNNN directories where that makes sense. `verify` reads every byte and
exits with 2 where something does not have its checksum. `prune` deletes all but the newest checkpoints, those of every
n-th step, and the best one. It first reads every byte of the newest: a damaged one is named, stays, and does not count.
It says what it would do with --dry-run. A run that is being trained is left alone: its own settings thin it out.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from aroface.errors import CheckpointError, DataError
from launch.console import new_table, show
from launch.evaluate_options import positive

_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = _action(actions, "info", "what is there: step, images seen, ranks, size, whole or not, the best")
    info.add_argument("--json", action="store_true", help="as JSON lines")
    _action(actions, "verify", "every byte against its checksum")
    prune = _action(actions, "prune", "delete old checkpoints of a run")
    prune.add_argument("--keep-last", type=positive, required=True, metavar="K", help="newest that stay")
    prune.add_argument("--keep-every", type=positive, metavar="N", help="steps divisible by N stay too")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory or step-NNNNNNNN directory")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    match args.action:
        case "info":
            _info(args.path, as_json=args.json)
        case "verify":
            _verify(args.path)
        case "prune":
            _prune(args)
    return 0


def _checkpoints(path: Path) -> list[Path]:
    from aroface.engine.checkpoint_layout import list_checkpoints, torn_saves

    if path.is_dir() and (path.name.startswith("step-") or (path / "COMPLETE").is_file()):
        return [path]
    found = [*list_checkpoints(path), *torn_saves(path)]
    if not found:
        what = "holds no checkpoints" if path.is_dir() else "is not a directory"
        raise CheckpointError(f"{path} {what}; give a run directory or one of its step-NNNNNNNN directories.")
    return found


def _info(path: Path, *, as_json: bool) -> None:
    rows = [_describe(directory) for directory in _checkpoints(path)]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    numbers = ("images seen", "ranks", "ZeRO", "classes", "MiB")
    table = new_table("checkpoint", *numbers, "state", "written by", title=str(path), numbers=numbers)
    table.columns[0].no_wrap = True
    for row in rows:
        size = f"{row['bytes'] / _MIB:,.1f}"
        counts = (row.get(key) for key in ("samples_seen", "world_size", "zero_stage", "num_classes"))
        table.add_row(
            row["checkpoint"],
            *("-" if n is None else f"{n:,}" for n in counts),
            size,
            row["state"],
            row["version"] or "-",
        )
    show(table)


def _describe(directory: Path) -> dict[str, Any]:
    """One checkpoint; its checksums are left to `verify`."""
    from aroface.engine.best import read_best
    from aroface.engine.checkpoint_layout import read_complete, read_state

    size = sum(path.stat().st_size for path in directory.iterdir() if path.name != "model.safetensors")
    row: dict[str, Any] = {"checkpoint": directory.name, "bytes": size, "state": "torn: never read", "version": None}
    try:
        missing = [name for name in read_complete(directory)["files"] if not (directory / name).is_file()]
        state = read_state(directory)
    except CheckpointError:
        return row
    try:
        best = read_best(directory.parent)
    except DataError:
        best = None
    is_best = best is not None and best.step == state["step"]
    good = f"whole, best by {best.metric} on {best.set}" if is_best and best is not None else "whole"
    return row | {
        "state": f"damaged: {missing[0]} is missing" if missing else good,
        "version": state["versions"].get("aroface"),
        **{key: state.get(key) for key in ("step", "samples_seen", "world_size", "num_classes", "git_commit")},
        "zero_stage": state["config"]["engine"]["zero_stage"],
        "precision": state["config"]["engine"]["precision"],
    }


def _verify(path: Path) -> None:
    from aroface.engine.checkpoint_layout import torn_saves, verify_checkpoint

    wrong, torn = [], set(torn_saves(path))
    for directory in _checkpoints(path):
        if directory in torn:
            print(f"{directory}: no checkpoint: a save that is under way or was cut short")
            continue
        try:
            verify_checkpoint(directory)
            print(f"{directory}: whole")
        except CheckpointError as error:
            wrong.append(str(error))
            print(f"{directory}: DAMAGED")
    if wrong:
        raise CheckpointError(f"{len(wrong)} damaged, which no command reads:\n  " + "\n  ".join(wrong))


def _is_good(directory: Path) -> bool:
    from aroface.engine.checkpoint_layout import verify_checkpoint

    try:
        verify_checkpoint(directory)
    except CheckpointError as error:
        print(f"{directory}: DAMAGED, stays, and is not counted: {error}")
        return False
    return True


def _prune(args: argparse.Namespace) -> None:
    from aroface.engine.best import read_best
    from aroface.engine.checkpoint_layout import list_checkpoints, prune
    from aroface.engine.run_directory import hold_run

    if not list_checkpoints(args.path):
        raise CheckpointError(f"{args.path} holds no checkpoints; give a run directory.")
    with nullcontext() if args.dry_run else hold_run(args.path):
        best = read_best(args.path)
        doomed = prune(
            args.path,
            keep_last=args.keep_last,
            keep_every=args.keep_every,
            best=best,
            is_dry=args.dry_run,
            is_good=_is_good,
        )
    for directory in doomed:
        print(f"{'would delete' if args.dry_run else 'deleted'} {directory}")
    kept = len(list_checkpoints(args.path)) - (len(doomed) if args.dry_run else 0)
    print(
        f"{len(doomed)} checkpoints, {kept} stay"
        + (f", the best ({best.metric} on {best.set}) among them" if best else "")
    )
