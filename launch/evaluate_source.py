"""Options and steps that the protocols share: where embeddings come from, how samples are fused, what is written."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import ConfigError
from launch.evaluate_options import positive, print_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from retrieval.protocols.collection import Collection

__all__ = ["add_out", "add_pooling", "add_source", "finish", "open_collection"]


def add_source(parser: argparse.ArgumentParser, *, images: str) -> None:
    """Declare --embeddings, or --model with --images, and what goes with them.

    Args:
        parser: of the protocol.
        images: what --images holds, for the help.
    """
    group = parser.add_argument_group("where the embeddings come from")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", type=Path, metavar="E", help="embedding file (.npz) or folder, with `keys`")
    source.add_argument("--model", type=Path, metavar="MODEL", help="run directory, checkpoint or .onnx; with --images")
    group.add_argument("--images", type=Path, metavar="PATH", help=images)
    group.add_argument("--flip", choices=("sum", "none"), default="sum", help="F1: mirror images added (%(default)s)")
    group.add_argument("--batch", type=positive, default=64, metavar="N", help="images per call (%(default)s)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    group.add_argument(
        "--alignment",
        metavar="ID",
        help="how the crops were aligned, kept in the result: numbers of two alignments do not compare",
    )


def add_pooling(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare --pooling."""
    parser.add_argument(
        "--pooling",
        default=default,
        metavar="NxDx",
        help="N1 keeps the norm of a sample, D1 weights by its detector score (%(default)s)",
    )


def add_out(parser: argparse.ArgumentParser, *, resamples: int | None = 1000) -> None:
    """Declare --resamples and --out."""
    if resamples is not None:
        parser.add_argument(
            "--resamples",
            type=int,
            default=resamples,
            metavar="N",
            help="of the bootstrap over subjects, for the intervals; 0: none (%(default)s)",
        )
    parser.add_argument(
        "--details", type=Path, metavar="D.npz", help="also write every score, for `aroface evaluate compare`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="result file")


def open_collection(args: argparse.Namespace, stack: ExitStack, *, total: int | None = None) -> "Collection":
    """Open what `add_source` declared.

    Args:
        args: parsed.
        stack: closes the progress bar.
        total: images to embed, for the bar; None: all that are there.

    Raises:
        ConfigError: --model without --images.
    """
    from retrieval.embedding_files import read_embeddings
    from retrieval.protocols.collection import EmbeddedCollection, ImageCollection
    from shards.faces import ImageFolder, open_face_set
    from shards.manifest import MANIFEST_NAME

    if args.embeddings is not None:
        return EmbeddedCollection(read_embeddings(args.embeddings))
    if args.images is None:
        raise ConfigError("--model needs --images: where the images lie.")
    from launch.embedders import open_embedder
    from launch.progress import Progress

    is_folder = args.images.is_dir() and not (args.images / MANIFEST_NAME).is_file()
    faces = ImageFolder(args.images) if is_folder else open_face_set(args.images)
    embedder = open_embedder(args.model, threads=args.threads, batch_size=args.batch)
    progress = stack.enter_context(Progress("Embed", total=total or len(faces.keys), unit="images"))
    return ImageCollection(faces, embedder, flip=args.flip, batch_size=args.batch, on_progress=progress.update)


def finish(
    args: argparse.Namespace,
    protocol: str,
    parts: Mapping[str, Any],
    *,
    title: str,
    rule: str,
    model: Mapping[str, Any],
    files: Sequence[Path],
    expected: Mapping[str, int] | None = None,
    details: "Mapping[str, NDArray[Any]] | None" = None,
    **more: Any,
) -> dict[str, Any]:
    """Write and print one record, with what was read and how it was prepared.

    Args:
        args: parsed.
        protocol: name.
        parts: counts, metrics, curves and warnings, as the builders of `retrieval.results` give them.
        title: of the table.
        rule: how rates became thresholds.
        model: metadata of the embeddings.
        files: protocol files, whose hashes are kept.
        expected: counts of the original; another number is a warning.
        details: arrays for --details.
        **more: further entries of the record.
    """
    from retrieval.results import file_hashes, result_record, write_result

    parts = dict(parts)
    warnings = list(parts.pop("warnings", ()))
    counts = dict(parts.pop("counts"))
    for name, count in (expected or {}).items():
        if counts.get(name, count) != count:
            warnings.append(f"{counts[name]} {name}; the original has {count}. These are not its numbers.")
    if counts.get("missing"):
        warnings.append(f"{counts['missing']} samples are missing or unreadable; they count as failures to enrol.")
    contract = model.get("contract")
    alignment = args.alignment or (contract or {}).get("template")
    if contract is None:
        warnings.append("The embeddings do not say how their images were prepared (colour order, alignment, size).")
    inputs = {"files": file_hashes(files), "model": dict(model)}
    if args.embeddings is not None:
        inputs["files"] |= file_hashes([args.embeddings])
    record = result_record(
        protocol,
        rule,
        counts=counts,
        **parts,
        warnings=warnings,
        inputs=inputs,
        preprocessing={"contract": contract, "alignment": alignment or "unknown", "flip": model.get("flip", "unknown")},
        **more,
    )
    if args.details is not None and details is not None:
        from retrieval.details import write_details

        write_details(args.details, protocol, dict(details))
    write_result(args.out, record)
    print_record(record, title=title)
    return record
