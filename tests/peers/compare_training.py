"""Train beside arcface_torch and the ARoFace release, by their own code: steps and loader in turns, in one process.

    python -m tests.peers.compare_training CHECKOUTS --out docs/results/peers-2-cores.json

CHECKOUTS holds `insightface` (deepinsight/insightface) and `ARoFace` (msed-Ebrahimi/ARoFace), as far as they are there.
Ours are the steps of `aroface bench step`. On the CPU the ratios are of CPU time, on a GPU of wall time; every ratio is
the median over the rounds. The result lists what had to be replaced to run their code.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aroface.bf16 import has_bf16_units
from aroface.engine.deepspeed_engine import start_distributed
from aroface.files import write_json
from launch.bench import step as step_bench
from launch.bench.measure import Measurement, interleave, machine
from launch.bench.output import measured
from launch.evaluate_options import positive
from tests.peers import loader_code, training_code

ARCFACE, ATTACK = Path("insightface/recognition/arcface_torch"), Path("ARoFace")
_OURS = ("plain", "adversarial", "delayed")


def main(arguments: list[str] | None = None) -> int:
    """Compare everything that is there; 1 if nothing is."""
    args = _parser().parse_args(arguments)
    if args.batch % 4:
        raise SystemExit(f"--batch {args.batch}: their attack needs a batch that divides by 4.")
    if not any((args.checkouts / name).is_dir() for name in (ARCFACE, ATTACK)):
        print(f"{args.checkouts} holds neither {ARCFACE} nor {ATTACK}")  # noqa: T201
        return 1
    torch.set_num_threads(args.threads)
    device = start_distributed()
    parts = args.parts.split(",")
    result: dict[str, Any] = {
        "what": "training steps and loader of public projects, by their own code, beside ours; variants in turns",
        "command": "python -m tests.peers.compare_training CHECKOUTS " + shlex.join((arguments or sys.argv[1:])[1:]),
        "commits": {name.parts[0]: _commit(args.checkouts, name) for name in (ARCFACE, ATTACK)},
        "machine": machine("torch", "deepspeed", "numpy", "opencv-python-headless", "simplejpeg", "torchvision"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "time": "wall" if device.type == "cuda" else "cpu",
    }
    if "step" in parts:
        result["step"] = compare_steps(args, device)
    if "loader" in parts and (args.checkouts / ARCFACE).is_dir():
        result["loader"] = compare_loaders(args)
    if args.out:
        write_json(args.out, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--parts", default="step,loader", metavar="A,B", help="(%(default)s)")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 100), default=18, help="of IResNet (%(default)s)")
    parser.add_argument("--batch", type=positive, default=16, metavar="B", help="images of a step (%(default)s)")
    parser.add_argument("--classes", type=positive, default=1000, metavar="C", help="(%(default)s)")
    parser.add_argument(
        "--peer-precision",
        choices=("fp32", "fp16"),
        default="fp16" if torch.cuda.is_available() else "fp32",
        help="of their step (fp16 on a GPU, as their configurations have it; fp32 on the CPU)",
    )
    parser.add_argument("--logit-precision", choices=("fp32", "bf16"), default="fp32", help="of ours (%(default)s)")
    parser.add_argument("--cuda-graphs", action="store_true", help="for ours in bf16")
    parser.add_argument("--steps", type=positive, default=1, metavar="N", help="of a round (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="counted (%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="on the CPU (%(default)s)")
    parser.add_argument("--images", type=positive, default=4000, metavar="N", help="of the loaders (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="faces for them in any layout (default: drawn ones)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="of the loaders (%(default)s)")
    return parser


def compare_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Ours as it trains and as they do it (fp32, contiguous), theirs as they come and with bf16 autocast put around.

    Bf16 only where the device has units for it.
    """
    ours = _our_steps(args, ["--cuda-graphs"] * args.cuda_graphs)
    plain_fp32 = _our_steps(args, ["--precision", "fp32", "--contiguous"], ways=("plain",))["plain"]
    work = {f"ours, {name}": step for name, step in ours.items()} | {"ours, plain, fp32": plain_fp32}
    for name, folder in (("arcface_torch", ARCFACE), ("ARoFace", ATTACK)):
        if not (args.checkouts / folder).is_dir():
            continue
        code = training_code.training_code(args.checkouts / folder)
        size = {"depth": args.depth, "batch": args.batch, "classes": args.classes}
        peer = training_code.PeerStep(code, **size, precision=args.peer_precision)
        work[f"{name}, plain"] = peer.plain
        if code.attack is not None:
            work[f"{name}, attacked"] = peer.attacked
        elif device.type == "cpu" and has_bf16_units():
            # On a GPU their network switches autocast off where it is not fp16.
            work[f"{name}, plain, bf16 autocast"] = training_code.PeerStep(code, **size, precision="bf16").plain
    found = {m.name: m for m in interleave(_repeated(work, args.steps), rounds=args.rounds, on_round=_progress)}
    column = 0 if device.type == "cuda" else 1
    ratios = {title: _ratio(found[a], found[b], column) for title, a, b in _step_ratios() if a in found and b in found}
    for name, one in found.items():
        _say(f"{name}, per image", 1e3 * statistics.median(r[column] for r in one.rounds) / one.items, "ms")
    for title, value in ratios.items():
        _say(title, value, "x")
    return {
        "settings": _settings(
            args, "depth", "batch", "classes", "steps", "rounds", "threads", "logit_precision", "cuda_graphs"
        )
        | {"peer_precision": args.peer_precision},
        "replaced": training_code.REPLACED,
        "ratios": ratios,
        "memory_gib": _memory(work) if device.type == "cuda" else None,
        "measurements": {name: measured(one) for name, one in found.items()},
    }


def _step_ratios() -> list[tuple[str, str, str]]:
    """Title, slower, faster: how many times the time of the second the first takes."""
    return [
        ("arcface_torch / ours, plain", "arcface_torch, plain", "ours, plain"),
        ("arcface_torch / ours, plain, fp32", "arcface_torch, plain", "ours, plain, fp32"),
        ("arcface_torch with bf16 autocast / ours, plain", "arcface_torch, plain, bf16 autocast", "ours, plain"),
        ("ARoFace attacked / ARoFace plain", "ARoFace, attacked", "ARoFace, plain"),
        ("ours adversarial / ours plain", "ours, adversarial", "ours, plain"),
        ("ours delayed / ours plain", "ours, delayed", "ours, plain"),
        ("ARoFace attacked / ours adversarial", "ARoFace, attacked", "ours, adversarial"),
        ("ARoFace attacked / ours delayed", "ARoFace, attacked", "ours, delayed"),
    ]


def _our_steps(
    args: argparse.Namespace, options: list[str], ways: tuple[str, ...] = _OURS
) -> dict[str, Callable[[], int]]:
    parser = argparse.ArgumentParser()
    step_bench.add_arguments(parser)
    size = ["--depth", args.depth, "--batch", args.batch, "--classes", args.classes, "--threads", args.threads]
    head = ["--logit-precision", args.logit_precision]
    settings = parser.parse_args([*map(str, size), *head, "--ways", ",".join(ways), *options])
    return dict(step_bench.StepBench(settings, list(ways)).ways)


def compare_loaders(args: argparse.Namespace) -> dict[str, Any]:
    """One epoch: our shards, their `get_dataloader`, and the plain rebuild that `bench loader` times."""
    from launch.bench.loader import _images, _write_records
    from launch.bench.peers import arcface_batches
    from shards.dataset import ShardDataset
    from shards.pack import PackOptions, pack

    with tempfile.TemporaryDirectory() as name:
        records, shards = Path(name) / "records", Path(name) / "shards"
        _write_records(records, _images(args.data, Path(name)), args.images)
        pack(records, shards, PackOptions(), workers=1)
        size, folder = min(256, args.images), args.checkouts / ARCFACE

        def ours() -> int:
            data = ShardDataset(shards, image_size=112, workers=max(1, args.workers))
            order = {"seed": 1, "start_position": 0, "rank": 0, "world_size": 1}
            batches = data.batches(num_batches=data.num_samples // size, batch_size=size, **order)
            return sum(len(batch.images) for batch in batches)

        def theirs() -> int:
            with loader_code.arcface_loader(folder, records, batch_size=size, workers=args.workers) as batches:
                return sum(len(images) for images in batches)

        def rebuilt() -> int:
            return sum(len(b[0]) for b in arcface_batches(records, batch_size=size, workers=args.workers))

        work = {"ours": ours, "arcface_torch": theirs, "arcface_torch, rebuilt plainly": rebuilt}
        found = {m.name: m for m in interleave(work, rounds=args.rounds, on_round=_progress)}
    ratios = {
        "arcface_torch / ours": _ratio(found["arcface_torch"], found["ours"], 1),
        "arcface_torch / its plain rebuild": _ratio(found["arcface_torch"], found["arcface_torch, rebuilt plainly"], 1),
    }
    for title, value in ratios.items():
        _say(f"loader, CPU time: {title}", value, "x")
    return {
        "settings": _settings(args, "images", "workers", "rounds")
        | {"batch_size": size, "data": args.data.name if args.data else "drawn"},
        "replaced": loader_code.replaced(),
        "ratios": ratios,
        "measurements": {name: measured(one) for name, one in found.items()},
    }


def _repeated(work: Mapping[str, Callable[[], int]], steps: int) -> dict[str, Callable[[], int]]:
    return {name: lambda step=step: sum(step() for _ in range(steps)) for name, step in work.items()}


def _ratio(slower: Measurement, faster: Measurement, column: int) -> float:
    """Median over the rounds of time per image over time per image."""
    return statistics.median(
        (slow[column] / slower.items) / max(fast[column] / faster.items, 1e-12)
        for slow, fast in zip(slower.rounds, faster.rounds, strict=True)
    )


def _memory(work: Mapping[str, Callable[[], int]]) -> dict[str, float]:
    """GiB of one step over what lies on the GPU between steps."""
    found = {}
    for name, step in work.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found


def _settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _commit(checkouts: Path, name: Path) -> str | None:
    """Of a checkout, and not of a repository around it, in which files without history may lie."""
    asked = ["git", "-C", str(checkouts / name), "rev-parse", "--show-toplevel", "HEAD"]
    result = subprocess.run(asked, capture_output=True, text=True)
    if result.returncode != 0:
        return None
    top, commit = result.stdout.splitlines()
    return commit if Path(top).is_relative_to(checkouts.resolve()) else None


def _say(title: str, value: float, unit: str) -> None:
    print(f"{title:<56} {value:>10,.3f} {unit}", flush=True)  # noqa: T201


def _progress(name: str, number: int) -> None:
    print(f"round {number}: {name}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
