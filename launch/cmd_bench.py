"""What this machine reaches, against its limit and against the usual way.

Variants run interleaved in one process tree, so that a busy neighbour hurts all of them alike; only ratios are worth
writing down. `aroface bench BENCHMARK --help` lists the options of a benchmark; `aroface bench machine` measures what
the limits are made of. Every benchmark takes --json, and --against DIR to compare with another checkout.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from launch.bench.against import compare
from launch.command_parser import CommandParser
from launch.evaluate_options import positive
from launch.subcommands import declare

#: benchmark -> (module with add_arguments and run, one line of help); every one has --out FILE for its record
BENCHMARKS: dict[str, tuple[str, str]] = {
    "machine": ("launch.bench.roofline", "peaks of this machine, of which the limits are made; in seconds"),
    "loader": (
        "launch.bench.loader",
        "packing, opening and reading shards, beside arcface_torch and webdataset",
    ),
    "head": ("launch.bench.head", "the classifier, plain, chunked and sampled, beside arcface_torch"),
    "engine": ("launch.bench.engine", "a training step at each ZeRO stage, beside bare PyTorch DDP"),
    "export": ("launch.bench.runtimes", "ONNX Runtime, int8 and OpenVINO beside eager PyTorch; exported files"),
    "gallery": ("launch.bench.gallery", "exact and approximate search, changes and memory, beside a bare Faiss index"),
    "serve": ("launch.bench.serve", "the service under load, beside the bare model"),
    "feeding": ("launch.bench.feeding", "how well a training was fed: waiting for batches, from its metrics"),
    "backbones": ("launch.bench.backbones", "parameters, GFLOPs and activations of every backbone; in seconds"),
    "protocols": ("launch.bench.protocols", "IJB-C, TinyFace and IJB-S at their real size, after embedding"),
    "step": ("launch.bench.step", "a training step with each kind of attack, against the plain step, and its parts"),
}
_PAIRS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks; each reads its own options."""
    declare(parser, BENCHMARKS, what="benchmark")


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, once or in turns with another checkout."""
    module = importlib.import_module(BENCHMARKS[args.entry][0])
    common = _common()
    parser = CommandParser(
        prog=f"aroface bench {args.entry}", description=module.__doc__, parents=[common], allow_abbrev=False
    )
    module.add_arguments(parser)
    chosen = parser.parse(args.rest, argparse.Namespace(entry=args.entry))
    options = _without_out(common.parse_known_args(args.rest)[1])
    wants_json, against, pairs = chosen.json, chosen.against, chosen.pairs
    for name in vars(common.parse_args([])):
        delattr(chosen, name)  # a benchmark notes its settings, and these are none of them

    def work() -> int:
        if against is None:
            return int(module.run(chosen))
        compare(args.entry, options, against, pairs, chosen.out)
        return 0

    return _printing_json(work, chosen) if wants_json else work()


def _printing_json(work: Callable[[], int], chosen: argparse.Namespace) -> int:
    """Run, and print the record that lies in the file `out` afterwards, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="aroface-bench-") as folder:
        chosen.out = chosen.out or Path(folder) / "record.json"
        with _stdout_is_stderr():
            code = work()
        print(chosen.out.read_text(encoding="utf-8"), end="")
    return code


def _common() -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("options of every benchmark")
    group.add_argument("--json", action="store_true", help="print the record as JSON, everything else to stderr")
    group.add_argument("--against", type=Path, metavar="DIR", help="run in turns with another checkout of aroface")
    group.add_argument("--pairs", type=positive, default=_PAIRS, metavar="N", help="runs of each")
    return parser


def _without_out(options: Sequence[str]) -> list[str]:
    """Each run of a comparison has a file of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    return parser.parse_known_args(options)[1]


@contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """What this process and those that it starts print goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
