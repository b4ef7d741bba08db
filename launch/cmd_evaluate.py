"""Identification and verification numbers, with intervals, counts and the rule they follow.

`aroface evaluate PROTOCOL --help` lists the options of a protocol.
"""

import argparse
import importlib
from collections.abc import Callable

#: protocol -> (module with add_arguments and run, one line of help)
PROTOCOLS: dict[str, tuple[str, str]] = {
    "identification": ("launch.evaluate_identification", "1:N search on embedding files, closed and open set"),
    "verification": ("launch.evaluate_verification", "1:1 comparison of listed pairs of an embedding file"),
    "lfw-lq": ("launch.evaluate_lfw_lq", "low-quality identification: shrunk, compressed, misaligned probes"),
    "fae": ("launch.evaluate_fae", "robustness to misalignment (FAE-1): accuracy against angle, shift and scale"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the protocols; each reads its own options."""
    width = max(map(len, PROTOCOLS))
    table = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in PROTOCOLS.items())
    parser.epilog = f"protocols:\n{table}"
    parser.add_argument("protocol", choices=PROTOCOLS, metavar="PROTOCOL", help=f"one of {', '.join(PROTOCOLS)}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run one protocol."""
    module = importlib.import_module(PROTOCOLS[args.protocol][0])
    add: Callable[[argparse.ArgumentParser], None] = module.add_arguments
    evaluate: Callable[[argparse.Namespace], int] = module.run
    parser = argparse.ArgumentParser(
        prog=f"aroface evaluate {args.protocol}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add(parser)
    return evaluate(parser.parse_args(args.rest))
