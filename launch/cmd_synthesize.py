"""Draw synthetic identities: faces with pose, light, expression and blur, to try things on without photographs."""

import argparse

from launch.outputs import output_folder

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aroface synthesize`."""
    parser.add_argument("out", type=output_folder, help="new directory; images are written as id_00000/000.jpg")
    parser.add_argument("--identities", type=int, default=100, metavar="N", help="people to draw")
    parser.add_argument("--images", type=int, default=10, help="images of each")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other people")


def run(args: argparse.Namespace) -> int:
    """Draw, and say what was drawn."""
    from shards.synthetic import write_synthetic

    write_synthetic(args.out, identities=args.identities, images_per_identity=args.images, seed=args.seed)
    print(f"{args.identities:,} identities with {args.images:,} images each written to {args.out}")
    return 0
