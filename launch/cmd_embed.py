"""Turn the faces of a folder, .zip or shard directory into embeddings (.npz).

MODEL is a run directory, one of its checkpoints (both on PyTorch), or an .onnx file (on ONNX Runtime). Embeddings are
written un-normalised, one row per image, with identity and key. An image that cannot be read gets a zero row marked
`fte` (failure to enrol) and is named in a warning.
"""

import argparse
import time
from pathlib import Path

from aroface.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="run directory, checkpoint or .onnx file")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or .zip of identity/image, or shards")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    parser.add_argument(
        "--take",
        choices=("all", "first", "rest"),
        default="all",
        help="all images, the first of each identity by name (a gallery), or the others (%(default)s)",
    )
    parser.add_argument(
        "--flip",
        choices=("none", "sum"),
        default="none",
        help="sum: add the embedding of the mirror image (%(default)s)",
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images per call (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the model (default: all cores)")
    parser.add_argument("--decode-threads", type=int, default=2, metavar="N", help="threads that decode (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="arithmetic of PyTorch, for checkpoints only (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Embed and save."""
    for option in ("batch", "threads", "decode_threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {value} is out of range; it is a count of at least 1.")
    if args.out.suffix != ".npz":
        raise ConfigError(f"--out {args.out} must end in .npz, such as {args.out.with_suffix('.npz')}.")
    from launch.embedders import open_embedder
    from launch.progress import Progress
    from retrieval.embeddings import write_embeddings
    from retrieval.extraction import embed_face_set, select_images
    from shards.faces import open_face_set

    faces = open_face_set(args.images)
    embedder = open_embedder(args.model, precision=args.precision, threads=args.threads, batch_size=args.batch)
    _refuse_double_flip(embedder, args)
    indices = select_images(faces, args.take)
    started = time.perf_counter()
    with Progress("Embed", total=len(indices), unit="images") as progress:
        extraction = embed_face_set(
            embedder,
            faces,
            indices=indices,
            flip=args.flip,
            batch_size=args.batch,
            decode_threads=args.decode_threads,
            on_progress=progress.update,
            metadata={"images": str(args.images), "take": args.take},
        )
    elapsed_s = time.perf_counter() - started
    write_embeddings(args.out, extraction.embeddings)
    identities = len({faces.identities[index] for index in indices})
    print(f"{args.out}: {len(indices)} images of {identities} identities, D = {embedder.embedding_dim}")
    print(
        f"  model {embedder.model_id}, {len(indices) / elapsed_s:.1f} images/s, {len(extraction.unreadable)} unreadable"
    )
    return 0


def _refuse_double_flip(embedder: object, args: argparse.Namespace) -> None:
    metadata = getattr(embedder, "metadata", None)
    if args.flip == "sum" and metadata is not None and metadata.flip_fusion:
        raise ConfigError(f"{args.model} adds the mirror image itself (--flip-fusion on export); use --flip none.")
