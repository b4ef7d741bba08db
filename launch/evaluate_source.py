"""Options and steps that the protocols share: where embeddings come from, how samples are fused, what is written."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import ConfigError
from launch.evaluate_device import search_blocks
from launch.evaluate_options import positive, print_record, whole
from launch.outputs import output_file
from launch.training_overlap import add_trained_on, overlap_warnings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aroface.types import FaceSet
    from retrieval.embeddings import EmbeddingSet
    from retrieval.protocols.collection import Collection

__all__ = ["RESAMPLES", "add_out", "add_pooling", "add_similarity", "add_source", "finish", "frozen", "open_collection"]
__all__ += ["open_images", "quality_name"]

#: Options that name files which the numbers depend on.
_FILE_OPTIONS = ("embeddings", "quality", "thresholds")
#: Length of candidate lists where a protocol has no --candidates.
_CANDIDATES = 20
#: Of the bootstrap over subjects, unless --resamples says otherwise.
RESAMPLES = 1000


def add_source(parser: argparse.ArgumentParser, *, images: str) -> None:
    """Declare --embeddings, or --model with --images, and what goes with them.

    Args:
        parser: of the protocol.
        images: what --images holds, for the help.
    """
    group = parser.add_argument_group("where the embeddings come from")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", type=Path, metavar="E", help="embedding file (.npz) or folder, with `keys`")
    source.add_argument(
        "--model", type=Path, metavar="MODEL", help="run directory, checkpoint, .onnx or .engine; with --images"
    )
    group.add_argument("--images", type=Path, metavar="PATH", help=images)
    group.add_argument("--flip", choices=("sum", "none"), default="sum", help="F1: mirror images added")
    group.add_argument("--batch", type=positive, default=64, metavar="N", help="images per call")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    group.add_argument(
        "--alignment",
        metavar="ID",
        help="how the crops were aligned, kept in the result: numbers of two alignments do not compare",
    )
    add_trained_on(group)
    group.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="lines `image quality` or `person number quality`, in place of the norm: for error-versus-discard curves "
        "and --pooling Q",
    )


def add_pooling(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare --pooling."""
    parser.add_argument(
        "--pooling",
        default=default,
        metavar="CODE",
        help="NxDx: N1 keeps the norm of a sample, D1 weights by its detector score; QDx: by --quality, else the norm; "
        "PFE: by the variances of the embeddings",
    )


def add_similarity(parser: argparse.ArgumentParser) -> None:
    """Declare --similarity."""
    parser.add_argument(
        "--similarity",
        choices=("cosine", "mls"),
        default="cosine",
        help="mls: mutual likelihood score, for embeddings with variances",
    )


def add_out(
    parser: argparse.ArgumentParser, *, pairs: bool = False, searches: bool = False, thresholds: bool = True
) -> None:
    """Declare --resamples, --out and what else is written, and --thresholds."""
    parser.add_argument(
        "--resamples",
        type=whole,
        default=RESAMPLES,
        metavar="N",
        help="of the bootstrap over subjects, for the intervals; 0: Wilson, as of independent trials "
        f"(default: {RESAMPLES})",
    )
    if thresholds:
        parser.add_argument(
            "--thresholds",
            type=Path,
            metavar="R.json",
            help="also the error rates here at the thresholds of that result: a system whose threshold was set once",
        )
    if pairs:
        parser.add_argument("--save-scores", type=output_file, metavar="S.npy", help="scores of all pairs, float32")
    if searches:
        parser.add_argument(
            "--save-candidates", type=output_file, metavar="C.csv", help="the best entries of every probe, as many as L"
        )
    parser.add_argument(
        "--details", type=output_file, metavar="D.npz", help="also write every score, for `aroface evaluate compare`"
    )
    parser.add_argument("--out", type=output_file, required=True, metavar="R.json", help="result file")


def open_collection(args: argparse.Namespace, stack: ExitStack, *, total: int | None = None) -> "Collection":
    """Open what `add_source` declared.

    Args:
        args: parsed.
        stack: closes the progress bar.
        total: images to embed, for the bar; None: all that are there.

    Raises:
        ConfigError: --model without --images.
    """
    from retrieval.protocols.collection import RatedCollection
    from retrieval.quality_file import QualityFile

    collection = _opened(args, stack, total)
    folders = (key.rpartition("/")[0].rpartition("/")[2] for key in collection.keys)
    args.warnings = overlap_warnings(args, (name for name in folders if name))
    return collection if args.quality is None else RatedCollection(collection, QualityFile(args.quality).rate)


def _opened(args: argparse.Namespace, stack: ExitStack, total: int | None) -> "Collection":
    from retrieval.embedding_files import read_embeddings
    from retrieval.parted_embeddings import PartedEmbeddings
    from retrieval.protocols.collection import EmbeddedCollection, ImageCollection

    if args.embeddings is not None:
        is_folder = args.embeddings.is_dir()
        return EmbeddedCollection(PartedEmbeddings(args.embeddings) if is_folder else read_embeddings(args.embeddings))
    if args.images is None:
        raise ConfigError("--model needs --images: where the images lie.")
    from launch.embedders import open_embedder
    from launch.progress import Progress

    faces = open_images(args.images)
    embedder = open_embedder(args.model, threads=args.threads, batch_size=args.batch)
    progress = stack.enter_context(Progress("Embed", total=total or len(faces.keys), unit="images"))
    return ImageCollection(faces, embedder, flip=args.flip, batch_size=args.batch, on_progress=progress.update)


def open_images(path: Path) -> "FaceSet":
    """Any image below a folder, or the faces of shards or an archive."""
    from shards.faces import ImageFolder, open_face_set
    from shards.manifest import MANIFEST_NAME

    is_folder = path.is_dir() and not (path / MANIFEST_NAME).is_file()
    return ImageFolder(path) if is_folder else open_face_set(path)


def quality_name(args: argparse.Namespace, embeddings: "EmbeddingSet") -> str:
    """What the quality is, for the result."""
    if getattr(args, "quality", None) is not None:
        return str(args.quality.name)
    if "pooling" in embeddings.metadata:  # templates always have qualities: the mean of what their samples had
        return str(embeddings.metadata.get("quality", "norm"))
    return "norm" if embeddings.qualities is None else "qualities of the file"


def frozen(args: argparse.Namespace, **scores: Any) -> dict[str, Any]:
    """Metrics at the thresholds of --thresholds, for `genuine` and `impostor` scores or for `searches`; else none."""
    if args.thresholds is None:
        return {}
    from retrieval.frozen import frozen_identification, frozen_verification
    from retrieval.results import read_result

    source = read_result(args.thresholds)
    return frozen_identification(source, **scores) if "searches" in scores else frozen_verification(source, **scores)


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
    scores: "NDArray[np.float32] | None" = None,
    searched: "tuple[Sequence[EmbeddingSet], EmbeddingSet] | None" = None,
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
        scores: of all pairs, for --save-scores.
        searched: galleries and probes, for --save-candidates.
        **more: further entries of the record.
    """
    from retrieval.results import file_hashes, preprocessing, result_record, write_result

    parts = dict(parts)
    warnings = list(parts.pop("warnings", ()))
    counts = dict(parts.pop("counts"))
    others = {name: count for name, count in (expected or {}).items() if counts.get(name, count) != count}
    if others:
        listed = ", ".join(f"{name} {counts[name]} (the original has {count})" for name, count in others.items())
        warnings.append(f"This is not the whole original set, and these are not its numbers: {listed}.")
    if counts.get("missing"):
        warnings.append(f"{counts['missing']} samples are missing or unreadable; they count as failures to enrol.")
    prepared, unknown = preprocessing(model, alignment=getattr(args, "alignment", None))
    read = [*files, *(p for name in _FILE_OPTIONS if (p := getattr(args, name, None)) is not None)]
    record = result_record(
        protocol,
        rule,
        counts=counts,
        **parts,
        warnings=[*warnings, *getattr(args, "warnings", ()), *unknown],
        inputs={"files": file_hashes(read), "model": dict(model)},
        preprocessing=prepared,
        **more,
    )
    write_result(args.out, record)
    _save(args, record, details, scores, searched)
    print_record(record, title=title)
    return record


def _save(
    args: argparse.Namespace,
    record: Mapping[str, Any],
    details: "Mapping[str, NDArray[Any]] | None",
    scores: "NDArray[np.float32] | None",
    searched: "tuple[Sequence[EmbeddingSet], EmbeddingSet] | None",
) -> None:
    if args.details is not None and details is not None:
        from retrieval.details import write_details

        said = {name: record[name] for name in ("protocol", "rule", "preprocessing")}
        write_details(args.details, details, **said)
    if getattr(args, "save_scores", None) is not None and scores is not None:
        import numpy as np

        from aroface.files import atomic_path

        with atomic_path(args.save_scores) as temporary, temporary.open("wb") as file:
            np.save(file, scores, allow_pickle=False)
    if getattr(args, "save_candidates", None) is not None and searched is not None:
        from retrieval.candidates import write_candidates

        count = getattr(args, "candidates", _CANDIDATES)
        write_candidates(
            args.save_candidates,
            *searched,
            count=count,
            similarity=getattr(args, "similarity", None) or "cosine",
            blocks=search_blocks(args),
        )
