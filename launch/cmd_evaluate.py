"""Identification and verification numbers, with intervals, counts and the rule they follow.

`aroface evaluate PROTOCOL --help` lists the options of a protocol.
"""

import argparse

from launch.subcommands import declare, run_chosen

#: protocol -> (module with add_arguments and run, one line of help)
PROTOCOLS: dict[str, tuple[str, str]] = {
    "identification": ("launch.evaluate_identification", "1:N search on embedding files, closed and open set"),
    "verification": ("launch.evaluate_verification", "1:1 comparison of listed pairs of an embedding file"),
    "lfw-lq": ("launch.evaluate_lfw_lq", "low-quality identification: shrunk, compressed, misaligned probes"),
    "fae": ("launch.evaluate_fae", "robustness to misalignment (FAE-1): accuracy against angle, shift and scale"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the protocols; each reads its own options."""
    declare(parser, PROTOCOLS, what="protocol")


def run(args: argparse.Namespace) -> int:
    """Run one protocol."""
    return run_chosen(args, PROTOCOLS, command="evaluate")
