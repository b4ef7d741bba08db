"""Which gallery a command works on: a directory, or a collection of Milvus."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import ConfigError
from retrieval.devices import DEVICE_NAMES

if TYPE_CHECKING:
    from retrieval.gallery import FaceGallery

__all__ = ["add_device", "add_gallery", "milvus_token", "open_gallery"]

_CONSISTENCY = ("Strong", "Bounded", "Session", "Eventually")


def add_gallery(parser: argparse.ArgumentParser) -> None:
    """Declare GALLERY and where it lies."""
    parser.add_argument("gallery", metavar="GALLERY", help="directory of the gallery; with --milvus a file or address")
    parser.add_argument(
        "--milvus",
        action="store_true",
        help="GALLERY is a file of Milvus Lite (faces.db) or the address of a Milvus server (http://host:19530); the "
        "environment variable AROFACE_MILVUS_TOKEN holds its key",
    )
    parser.add_argument("--collection", default="faces", metavar="NAME", help="collection in Milvus")
    parser.add_argument(
        "--consistency",
        choices=_CONSISTENCY,
        default="Strong",
        help="when searches on Milvus see changes",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare --device, as `retrieval.gallery.Gallery.open` takes it."""
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="D",
        help=f"where the gallery is searched: {DEVICE_NAMES}",
    )


def milvus_token() -> str:
    """`user:password` or key of the Milvus server."""
    return os.environ.get("AROFACE_MILVUS_TOKEN", "")


def open_gallery(args: argparse.Namespace, *, device: str = "cpu") -> "FaceGallery":
    """The gallery that the options name.

    Raises:
        DataError: there is none, or it is damaged.
        ConfigError: no such device, none to choose (Milvus), or no connection.
    """
    from retrieval.gallery import Gallery, MilvusGallery

    if args.milvus:
        if device != "cpu":
            raise ConfigError(
                f"--device {device} is where a directory is searched; a gallery of Milvus is searched by its server. "
                "Leave it away."
            )
        return MilvusGallery.open(
            args.gallery, collection=args.collection, consistency=args.consistency, token=milvus_token()
        )
    return Gallery.open(Path(args.gallery), device=device)
