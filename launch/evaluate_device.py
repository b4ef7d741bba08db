"""Where probes are compared with the gallery: --device of the protocols that search."""

import argparse
from typing import TYPE_CHECKING

from aroface.errors import ConfigError
from retrieval.devices import DEVICE_NAMES

if TYPE_CHECKING:
    from retrieval.metrics import BlockMaker

__all__ = ["add_device", "search_blocks"]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare --device; None unless it is given."""
    parser.add_argument(
        "--device",
        metavar="D",
        help=f"of the search: {DEVICE_NAMES}; several share the gallery, and the numbers are the same (default: cpu)",
    )


def search_blocks(args: argparse.Namespace) -> "BlockMaker | None":
    """What forms the scores of searches on the devices of --device; None for the CPU.

    To be called before embeddings are read or made, which takes longer than to say what is wrong.

    Raises:
        ConfigError: there is no such device, or it cannot compute what --similarity asks for.
    """
    device = getattr(args, "device", None) or "cpu"
    if device == "cpu":
        return None
    from retrieval.metrics.device_blocks import blocks_on, search_devices

    devices = search_devices(device)
    if getattr(args, "similarity", "cosine") != "cosine":
        raise ConfigError(
            f"--similarity {args.similarity} is computed on the CPU only, and --device is {device}; choose cpu, or "
            "--similarity cosine."
        )
    return blocks_on(devices)
