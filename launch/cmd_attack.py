"""Show what the alignment attack does to training images: clean, randomly misaligned, and adversarially misaligned.

RUN is a trained run or checkpoint. Its classifier is needed, so the images come from its training shards. Writes a
picture with the loss of every version, and prints the mean losses.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import ConfigError

if TYPE_CHECKING:
    from launch.attack_demo import AttackDemo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="training shards (default: those of the run)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images in the picture (%(default)s)")
    parser.add_argument(
        "--sample", type=int, default=256, metavar="N", help="images that the mean losses are taken over (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and the start (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Attack, draw, print."""
    from launch.attack_demo import run_attack

    if not 1 <= args.images <= args.sample:
        raise ConfigError(f"--images {args.images} must lie between 1 and --sample {args.sample}.")
    demo = run_attack(args.run, shards=args.shards, count=args.sample, seed=args.seed)
    _draw(demo, args.images, args.out)
    print(f"mean loss of {len(demo.clean_loss)} training images, running batch-norm statistics:")
    for name, losses in (("clean", demo.clean_loss), ("random", demo.random_loss), ("attacked", demo.attacked_loss)):
        print(f"  {name:<9} {losses.mean():7.3f}")
    harder = (demo.attacked_loss > demo.random_loss).mean()
    print(f"the attack is harder than a random misalignment of the same size for {100 * harder:.0f} % of the images")
    print(f"picture: {args.out}")
    return 0


def _draw(demo: "AttackDemo", images: int, out: Path) -> None:
    from matplotlib.figure import Figure

    from aroface.files import atomic_path

    rows: list[tuple[str, Any, Any]] = [
        ("clean", demo.clean, demo.clean_loss),
        ("random", demo.random, demo.random_loss),
        ("attacked", demo.attacked, demo.attacked_loss),
    ]
    figure = Figure(figsize=(1.25 * images + 0.5, 4.7), layout="constrained", facecolor="white")
    panels = figure.subplots(3, images, squeeze=False)
    for row, (name, pixels, losses) in enumerate(rows):
        for column in range(images):
            axes = panels[row, column]
            axes.imshow(pixels[column], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            caption = f"loss {losses[column]:.1f}"
            if row == 2:
                caption += f"\n{demo.describe(column)}"
            axes.set_xlabel(caption, fontsize=7)
        panels[row, 0].set_ylabel(name, fontsize=10)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
