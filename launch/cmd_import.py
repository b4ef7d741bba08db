"""Bring weights of other projects in, or take yours out.

    a checkpoint of ours from a file of theirs:
        aroface import model.pt --out runs/theirs
    a file of arcface_torch from a checkpoint of ours:
        aroface import runs/mine --to arcface_torch --out model.pt

Read are the files of InsightFace arcface_torch and the ARoFace release (model.pt, backbone.pt, checkpoint_gpu_0.pt),
AdaFace (Lightning .ckpt) and CVLface (model.pt, model.safetensors): IResNet, IR, MobileFaceNet and vision transformers.
Only tensors are read; a file that would have to run code is refused. What is written holds weights and their input
contract: `embed`, `export` and `evaluate --model` take it, and `train` starts from it with model.init_from.
"""

import argparse
from pathlib import Path

from aroface.errors import ConfigError
from launch.outputs import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, metavar="FILE|RUN", help="weight file of theirs; with --to: run of ours")
    parser.add_argument(
        "--out", type=output, required=True, metavar="PATH", help="new run directory; with --to: the file"
    )
    parser.add_argument("--to", choices=("arcface_torch",), help="write this layout instead of reading one")
    parser.add_argument(
        "--colour-order",
        choices=("rgb", "bgr"),
        help="channel order that the network was trained with (default: as its project does it: arcface_torch rgb, "
        "AdaFace bgr, CVLface what model.yaml or config.json beside the file says)",
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: 112 where it fits)")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of a transformer of unusual size")


def run(args: argparse.Namespace) -> int:
    """Import or write back."""
    if args.to is not None:
        return _write_back(args)
    if args.source.is_dir():
        raise ConfigError(
            f"{args.source} is a directory. To import, name the weight file in it, such as model.pt; to write a run of "
            "yours in another layout, add --to arcface_torch."
        )
    from aroface.weights import read_weights, write_weights

    weights = read_weights(args.source, colour_order=args.colour_order, image_size=args.image_size, heads=args.heads)
    checkpoint = write_weights(weights, args.out)
    parameters = sum(value.numel() for name, value in weights.tensors.items() if not _is_statistic(name))
    contract, source = weights.contract, weights.source
    print(f"{args.source}: {weights.model.name} in the layout {source['layout']}, {parameters / 1e6:.2f} M parameters")
    if source["tensors_ignored"]:
        print(f"  {source['tensors_ignored']} tensors that are no part of the backbone were left out")
    print(
        f"  input {contract.image_size} px, {contract.colour_order} (from {source['colour_order_from']}), "
        f"(pixel - {contract.mean:g}) / {contract.std:g}, faces aligned to {contract.template}"
    )
    print(f"  written: {checkpoint}")
    print(f"  next: aroface embed {args.out} FACES --out FILE.npz, or aroface export {args.out} --out model.onnx")
    return 0


def _write_back(args: argparse.Namespace) -> int:
    given = [
        option
        for option, value in (
            ("--colour-order", args.colour_order),
            ("--image-size", args.image_size),
            ("--heads", args.heads),
        )
        if value is not None
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: of a run of yours this is known; leave it out with --to.")
    if args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a directory; name a file in it, such as {args.out / 'model.pt'}.")
    from aroface.weights import write_arcface_torch

    name = write_arcface_torch(args.source, args.out)
    print(f'{args.out}: weights for backbones.get_model("{name}") of arcface_torch, RGB input')
    return 0


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))
