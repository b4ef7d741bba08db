"""Commands that have commands of their own, such as `aroface evaluate PROTOCOL`: a table, each imported when chosen."""

import argparse
import importlib
import re
from collections.abc import Callable, Mapping

from launch.command_parser import CommandParser

__all__ = ["Table", "declare", "run_chosen"]

#: name -> (module with add_arguments and run, one line of help)
Table = Mapping[str, tuple[str, str]]


def declare(parser: argparse.ArgumentParser, table: Table, *, what: str) -> None:
    """Take the name of one entry and everything after it; the entry reads its own options.

    Args:
        parser: of the command.
        table: its entries.
        what: what an entry is called, such as `protocol`.
    """
    width = max(map(len, table), default=0)
    lines = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in table.items())
    parser.epilog = f"{what}s:\n{lines}"
    parser.add_argument(
        "entry", choices=table, metavar=what.upper(), help=f"one of {', '.join(table)}; each has its own --help"
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run_chosen(args: argparse.Namespace, table: Table, *, command: str) -> int:
    """Parse the rest with the options of the chosen entry and run it."""
    run: Callable[[argparse.Namespace], int] = importlib.import_module(table[args.entry][0]).run
    parser = _parser_of(args.entry, table, command)
    chosen, unknown = parser.parse_known(args.rest, argparse.Namespace(entry=args.entry))
    if unknown:
        options = (word.partition("=")[0] for word in unknown if word.startswith("--"))
        owners = "".join(_belongs_to(option, table, command) for option in options)
        known = f"unrecognized arguments: {' '.join(unknown)}{owners}"
        parser.error(known if owners else parser.unknown_message(unknown))
    return run(chosen)


def _parser_of(entry: str, table: Table, command: str) -> CommandParser:
    module = importlib.import_module(table[entry][0])
    add_arguments: Callable[[argparse.ArgumentParser], None] = module.add_arguments
    parser = CommandParser(prog=f"aroface {command} {entry}", description=module.__doc__)
    add_arguments(parser)
    return parser


def _belongs_to(option: str, table: Table, command: str) -> str:
    """Which entries have this option, for the person who gave it to another one."""
    owners = [
        entry for entry in table if option in re.findall(r"--[\w-]+", _parser_of(entry, table, command).format_usage())
    ]
    return f"; {option} belongs to {', '.join(owners)}" if owners else ""
