"""Commands that have commands of their own, such as `aroface evaluate PROTOCOL`: a table, each imported when chosen."""

import argparse
import importlib
from collections.abc import Callable, Mapping

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
    module = importlib.import_module(table[args.entry][0])
    add_arguments: Callable[[argparse.ArgumentParser], None] = module.add_arguments
    run: Callable[[argparse.Namespace], int] = module.run
    parser = argparse.ArgumentParser(
        prog=f"aroface {command} {args.entry}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(args.rest, argparse.Namespace(entry=args.entry)))
