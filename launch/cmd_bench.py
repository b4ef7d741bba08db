"""What this machine reaches, against its limit and against the usual way.

Variants run interleaved in one process tree, so that a busy neighbour hurts all of them alike; only ratios are worth
writing down. `aroface bench BENCHMARK --help` lists the options of a benchmark.
"""

import argparse

from launch.subcommands import declare, run_chosen

#: benchmark -> (module with add_arguments and run, one line of help)
BENCHMARKS: dict[str, tuple[str, str]] = {
    "loader": (
        "launch.bench.loader",
        "packing, opening and reading shards, beside arcface_torch and webdataset",
    ),
    "head": ("launch.bench.head", "the classifier, plain, chunked and sampled, beside arcface_torch"),
    "engine": ("launch.bench.engine", "a training step at each ZeRO stage, beside bare PyTorch DDP"),
    "export": ("launch.bench.runtimes", "ONNX Runtime, int8 and OpenVINO beside eager PyTorch; exported files"),
    "gallery": ("launch.bench.gallery", "exact and approximate search, changes and memory, beside a bare Faiss index"),
    "serve": ("launch.bench.serve", "the service under load, beside the bare model"),
    "backbones": ("launch.bench.backbones", "parameters, GFLOPs and activations of every backbone; in seconds"),
    "protocols": ("launch.bench.protocols", "IJB-C, TinyFace and IJB-S at their real size, after embedding"),
    "step": ("launch.bench.step", "a training step with each kind of attack, against the plain step"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks; each reads its own options."""
    declare(parser, BENCHMARKS, what="benchmark")


def run(args: argparse.Namespace) -> int:
    """Run one benchmark."""
    return run_chosen(args, BENCHMARKS, command="bench")
