"""Size of every backbone: parameters, arithmetic, and the memory that training keeps for the backward pass.

The networks run on PyTorch's meta device, which knows shapes only, so the table takes seconds and is the same on every
machine; only the transformers run for real, on the CPU, where attention is fused as it is on a GPU. GFLOPs count a
multiplication and an addition as two, for one image forward; papers often print multiply-adds, which are half of it.
Activations are what is alive between the forward and the backward pass, per image in fp32.
"""

import argparse
import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from aroface.config import parse_config
from aroface.config.model import VIT_SIZES, ModelSection
from aroface.errors import ConfigError
from aroface.models import Backbone, build_backbone
from launch.bench.output import Report
from launch.outputs import output_file

__all__ = ["PUBLISHED", "activation_bytes", "forward_flops"]

#: Name -> `model` section of every network with a name in the field.
PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"iresnet{depth}": {"kind": "iresnet", "depth": depth} for depth in (18, 34, 50, 100, 200)},
    **{f"ir{depth}": {"kind": "ir", "depth": depth} for depth in (18, 34, 50, 101)},
    "mobilefacenet": {"kind": "mobilefacenet", "size": "base"},
    "mobilefacenet-large": {"kind": "mobilefacenet", "size": "large"},
    **{
        f"vit-{size}": {"kind": "vit", "width": width, "depth": depth, "mask_ratio": 0.0, "drop_path": 0.0}
        for size, (width, depth) in VIT_SIZES.items()
    },
}

_BATCH = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--only", metavar="NAME", help=f"one of {', '.join(PUBLISHED)} (default: all)")
    parser.add_argument("--image-size", type=int, default=112, metavar="PX", help="side of the input")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Build, count, print a table in Markdown."""
    if args.only is not None and args.only not in PUBLISHED:
        raise ConfigError(f"--only {args.only!r} is not a backbone; choose from {', '.join(PUBLISHED)}.")
    rows = [
        measure(name, settings | {"image_size": args.image_size})
        for name, settings in PUBLISHED.items()
        if args.only in (None, name)
    ]
    print("| backbone | parameters, M | GFLOPs forward | activations, MiB | recomputed, MiB |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['parameters'] / 1e6:.2f} | {row['flops'] / 1e9:.2f} | "
            f"{row['activation_bytes'] / 2**20:.1f} | {row['recomputed_activation_bytes'] / 2**20:.1f} |"
        )
    report = Report("backbones", ("torch",), {"image_size": args.image_size, "precision": "fp32", "batch": _BATCH})
    report.details["backbones"] = rows
    report.write(args.out)
    return 0


def measure(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, FLOPs of one image, and bytes of activations per image without and with recomputation."""
    plain, recomputing = (_build({**settings, "checkpoint_activations": recompute}) for recompute in (False, True))
    images = torch.empty(_BATCH, 3, plain.image_size, plain.image_size, device="meta")
    flops = forward_flops(plain, images)
    if settings["kind"] == "vit":  # on meta, attention is not the fused one that keeps no attention matrix
        plain, recomputing = plain.to_empty(device="cpu"), recomputing.to_empty(device="cpu")
        images = torch.zeros_like(images, device="cpu")
    return {
        "name": name,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "flops": flops // _BATCH,
        "activation_bytes": activation_bytes(plain, images) // _BATCH,
        "recomputed_activation_bytes": activation_bytes(recomputing, images) // _BATCH,
    }


def _build(settings: Mapping[str, Any]) -> Backbone:
    config = parse_config({"model": dict(settings)}, ModelSection, name="backbone").model
    with torch.device("meta"):
        return build_backbone(config)


def forward_flops(module: nn.Module, inputs: Tensor) -> int:
    """Additions and multiplications of convolutions, matrix products and attention in one forward pass."""
    module.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs)
    return int(counter.get_total_flops())


def activation_bytes(module: nn.Module, inputs: Tensor) -> int:
    """Bytes that one training forward pass leaves alive for the backward pass, without parameters and input."""
    module.train()
    with _Storages() as storages:
        output = module(inputs)
    gc.collect()
    alive: int = storages.alive_bytes(without=[inputs, *module.parameters(), *module.buffers()])
    del output
    return alive


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._seen[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive_bytes(self, *, without: Iterable[Tensor]) -> int:
        """Bytes of the storages that still exist and belong to none of these tensors."""
        left_out = {tensor.untyped_storage()._cdata for tensor in without}
        alive: list[int] = [
            size for key, (ref, size) in self._seen.items() if key not in left_out and not ref.expired()
        ]
        return sum(alive)
