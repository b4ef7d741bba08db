"""Show what the alignment attack does to training images, and measure how strong each way of attack is.

RUN is a trained run or checkpoint. Its classifier is needed, so the images come from its training shards. `--out` draws
a picture with the loss of every version, and prints the mean losses. `--strength` measures every way on augmented
training batches: its loss increase as a share of that of exact sign ascent.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import ConfigError
from launch.outputs import output_file

if TYPE_CHECKING:
    from launch.attack_demo import AttackDemo

_WAYS = "random,adversarial"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--out", type=output_file, metavar="FILE.png", help="the picture")
    parser.add_argument(
        "--ways", default=_WAYS, metavar="A,B|all", help="rows of the picture; an unknown name lists them"
    )
    parser.add_argument("--shards", type=Path, metavar="DIR", help="training shards (default: those of the run)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images in the picture")
    parser.add_argument(
        "--sample", type=int, default=256, metavar="N", help="images that the mean losses are taken over"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the images and the start")
    parser.add_argument(
        "--strength", type=output_file, metavar="FILE.json", help="measure every way and write the figures"
    )
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches that --strength measures")
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="images of each of these batches")


def run(args: argparse.Namespace) -> int:
    """Attack; draw or measure."""
    if args.out is None and args.strength is None:
        raise ConfigError("Nothing to do: give --out FILE.png for a picture, or --strength FILE.json for figures.")
    if not 1 <= args.images <= args.sample:
        raise ConfigError(f"--images {args.images} must lie between 1 and --sample {args.sample}.")
    if args.strength is not None:
        _measure(args)
    if args.out is not None:
        _show(args)
    return 0


def _show(args: argparse.Namespace) -> None:
    from launch.attack_demo import run_attack
    from launch.attacked_run import WAYS

    ways = list(WAYS) if args.ways == "all" else [way.strip() for way in args.ways.split(",")]
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise ConfigError(f"--ways {args.ways}: {unknown[0]!r} is unknown; choose of {', '.join(WAYS)}, or all.")
    demo = run_attack(args.run, shards=args.shards, ways=ways, count=args.sample, seed=args.seed)
    _draw(demo, args.images, args.out)
    clean, *others = demo.versions
    print(f"mean loss of {len(clean.losses)} training images, running batch-norm statistics:")
    for version in demo.versions:
        print(f"  {version.way:<22} {version.losses.mean():7.3f}")
    by_way = {version.way: version for version in others}
    if "random" in by_way and "adversarial" in by_way:
        harder = (by_way["adversarial"].losses > by_way["random"].losses).mean()
        print(
            f"the attack is harder than a random misalignment of the same size for {100 * harder:.0f} % of the images"
        )
    print(f"picture: {args.out}")


def _draw(demo: "AttackDemo", images: int, out: Path) -> None:
    from matplotlib.figure import Figure

    from aroface.files import atomic_path

    rows = len(demo.versions)
    figure = Figure(figsize=(1.25 * images + 0.5, 1.57 * rows), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, images, squeeze=False)
    for row, version in enumerate(demo.versions):
        for column in range(images):
            axes = panels[row, column]
            axes.imshow(version.pixels[column], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(version.describe(column), fontsize=7)
        panels[row, 0].set_ylabel(version.way, fontsize=10 if len(version.way) < 14 else 7)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _measure(args: argparse.Namespace) -> None:
    from launch.attack_strength import measure_strength
    from launch.attacked_run import open_run
    from launch.bench.output import Report

    if args.batch % 4 or args.batch < 8 or args.batches < 1:
        raise ConfigError(
            f"--batch {args.batch} x --batches {args.batches}: a quarter of a batch is warped at a time, so --batch "
            "must be a multiple of 4 from 8 on, and --batches at least 1."
        )
    trained = open_run(args.run, shards=args.shards)
    settings = {
        "run_config": trained.config.model_dump(mode="json", exclude={"data": {"shards", "cache"}}),
        "training_images": trained.data.num_samples,
        "batches": args.batches,
        "batch": args.batch,
        "seed": args.seed,
    }
    report = Report("attack strength", ("torch",), settings)
    strengths = measure_strength(trained, batches=args.batches, batch_size=args.batch, seed=args.seed)
    for strength in strengths:
        report.add(f"{strength.way}, loss in the training step", strength.loss_training, "")
    for strength in strengths[1:]:
        report.add(f"{strength.way}, increase kept, training step", 100 * strength.kept_training[0], "% of exact")
        report.add(f"{strength.way}, increase kept, running averages", 100 * strength.kept_running[0], "% of exact")
    report.details["ways"] = {s.way: vars(s) for s in strengths}
    report.write(args.strength)
