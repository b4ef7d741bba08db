"""What a configuration would cost on N GPUs, before anyone pays for them: memory, communication and time of a step.

A model, not a measurement: counts of the real network and formulas, with the data sheet of a GPU and assumed shares of
it that are reached (printed with the result; docs/scaling.md tells where each term comes from). Exit code 2 when the
configuration does not fit, with the settings that would make it fit.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aroface import __version__
from aroface.config import TrainConfig, load_config
from aroface.engine.schedule import check_share
from aroface.errors import ConfigError
from launch.outputs import output_file

if TYPE_CHECKING:
    from launch.plan.hardware import Efficiency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file with the whole configuration")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings to change; values are YAML")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs over all nodes")
    parser.add_argument("--gpu", default="h100", help="a100-40, a100, h100 (default), h200 or b200")
    parser.add_argument("--classes", type=_count, metavar="C", help="identities, such as 617970 or 10M (default: data)")
    parser.add_argument(
        "--images", type=_count, metavar="N", help="images of an epoch, for the whole run (default: data)"
    )
    parser.add_argument(
        "--grid", action="store_true", help="0.2 M to 100 M classes on 1 to 512 GPUs, images a GPU kept"
    )
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the numbers as JSON")
    assumed = parser.add_argument_group("assumptions")
    assumed.add_argument(
        "--backbone-efficiency", type=float, metavar="X", help="share of the peak that the backbone reaches"
    )
    assumed.add_argument(
        "--head-efficiency", type=float, metavar="X", help="share of the peak that the head's products reach"
    )
    assumed.add_argument("--link-efficiency", type=float, metavar="X", help="share of the rate of links and network")
    assumed.add_argument("--overlap", type=float, metavar="X", help="share of the gradient exchange that is hidden")


def _count(text: str) -> int:
    """A number such as 617970, 0.2M or 10M."""
    factors = {"k": 1_000, "m": 1_000_000}
    factor = factors.get(text[-1:].lower(), 1)
    try:
        value = round(float(text[:-1] if factor > 1 else text) * factor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 617970 or 10M") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 or more")
    return value


def run(args: argparse.Namespace) -> int:
    """Count, calculate and print."""
    config = load_config(args.config, TrainConfig, args.overrides)
    from launch.plan.hardware import GPUS
    from launch.plan.page import grid_page, plan_page

    if args.gpu not in GPUS:
        raise ConfigError(f"--gpu {args.gpu} is not known; choose from {', '.join(GPUS)}.")
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus} must be 1 or more.")
    if not args.grid:
        check_share(config, args.gpus)
    classes, images = args.classes, args.images
    if classes is None or (images is None and not args.grid):
        classes, images = _from_data(config, classes, images)
    make = grid_page if args.grid else plan_page
    page = make(
        config, gpus=args.gpus, gpu=GPUS[args.gpu], classes=classes, images=images, efficiency=_efficiency(args)
    )
    print(page.text)
    if args.out is not None:
        from aroface.files import write_json

        command = shlex.join(["aroface", *sys.argv[1:]])
        write_json(args.out, {"command": command, "version": __version__, **page.numbers})
    return 0 if page.fits else 2


def _from_data(config: TrainConfig, classes: int | None, images: int | None) -> tuple[int, int | None]:
    """Classes and images of the training set where they were not given."""
    from aroface.errors import ArofaceError
    from launch.training_data import open_training_data

    try:
        data = open_training_data(config.data, image_size=config.model.image_size)
    except ArofaceError as error:
        if classes is None:
            raise ConfigError(f"{error} To plan without data, give --classes C (and --images N).") from error
        return classes, images
    return classes or data.num_classes, images or data.num_samples


def _efficiency(args: argparse.Namespace) -> "Efficiency":
    from launch.plan.hardware import Efficiency

    given = {
        "backbone": args.backbone_efficiency,
        "head": args.head_efficiency,
        "link": args.link_efficiency,
        "overlap": args.overlap,
    }
    for name, value in given.items():
        low = 0.0 if name == "overlap" else 1e-6
        if value is not None and not low <= value <= 1:
            option = name if name == "overlap" else f"{name}-efficiency"
            raise ConfigError(f"--{option} {value} is a share; give a number above 0 and up to 1.")
    return Efficiency(**{name: value for name, value in given.items() if value is not None})
