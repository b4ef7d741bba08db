"""LFW-LQ: identification with probes that are small, compressed and badly aligned, at several sizes.

Gallery: the first image of every identity; probes: all others, clean and degraded by a draw from their name. Beside it
the verification of clean pairs. A baseline of raw pixels is always shown, --untrained adds the same network with fresh
weights: what is not clearly better than both has learned nothing.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.console import new_table, show
from launch.evaluate_options import counts, positive
from launch.outputs import output_file
from launch.training_overlap import add_trained_on, overlap_warnings

if TYPE_CHECKING:
    from aroface.types import Embedder, FaceSet
    from retrieval.protocols.lfw_pairs import Pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="run directory, checkpoint or .onnx")
    parser.add_argument("--faces", type=Path, required=True, metavar="PATH", help="folder, .zip or shards")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="list in LFW's format (default: pairs drawn from the set)"
    )
    parser.add_argument(
        "--max-missing-pairs",
        type=int,
        default=0,
        metavar="N",
        help="listed pairs whose images the set lacks that may be left out",
    )
    parser.add_argument("--untrained", type=Path, metavar="RUN", help="also run this checkpoint with fresh weights")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the raw pixels")
    parser.add_argument("--sizes", type=counts, default=[40, 28, 20, 14], metavar="PX,..", help="sizes")
    parser.add_argument(
        "--severity", type=float, default=0.5, metavar="0..1", help="size of the alignment error, 1: the largest"
    )
    add_trained_on(parser)
    parser.add_argument("--flip", choices=("sum", "none"), default="sum", help="mirror images added")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images per call")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    parser.add_argument("--out", type=output_file, required=True, metavar="R.json", help="result file")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from launch.embedders import open_embedder
    from launch.progress import Progress
    from retrieval.protocols.lfw_lq import LfwLqSettings, evaluate_lfw_lq, num_forward_images
    from retrieval.results import file_hashes, write_result
    from shards.faces import open_face_set

    faces = open_face_set(args.faces)
    pairs, missing = _pairs(args, faces)
    settings = LfwLqSettings(tuple(args.sizes), severity=args.severity, flip=args.flip, batch_size=args.batch)
    model = open_embedder(args.model, threads=args.threads, batch_size=args.batch)
    total = num_forward_images(faces, settings)
    records: dict[str, dict[str, Any]] = {}
    for name, embedder in {"model": model, **_baselines(args)}.items():
        with Progress(f"LFW-LQ, {name}", total=total, unit="images") as progress:
            records[name] = evaluate_lfw_lq(embedder, faces, settings, pairs=pairs, on_progress=progress.update)
    record = records.pop("model")
    record["baselines"] = records
    record["counts"]["missing_pairs"] = len(missing)
    record["warnings"] += [*missing, *overlap_warnings(args, faces.identities)]
    files = [path for path in (args.faces, args.pairs) if path is not None and path.is_file()]
    record["inputs"] = {"faces": str(args.faces), "files": file_hashes(files)}
    write_result(args.out, record)
    _print(record)
    return 0


def _pairs(args: argparse.Namespace, faces: "FaceSet") -> "tuple[Pairs, list[str]]":
    from retrieval.protocols.lfw_pairs import draw_pairs, read_lfw_pairs

    if args.pairs is None:
        return draw_pairs(faces.identities), []
    return read_lfw_pairs(args.pairs, keys=faces.keys, identities=faces.identities, max_missing=args.max_missing_pairs)


def _baselines(args: argparse.Namespace) -> "dict[str, Embedder]":
    from retrieval.baselines import PixelEmbedder

    found: dict[str, Embedder] = {}
    if args.untrained is not None:
        from aroface.inference import TorchEmbedder, untrained_model

        found["untrained"] = TorchEmbedder(untrained_model(args.untrained), batch_size=args.batch)
    if not args.no_baselines:
        found["pixels"] = PixelEmbedder()
    return found


def _print(record: dict[str, Any]) -> None:
    columns = {"model": record, **record["baselines"]}
    table = new_table("metric", *columns, title="LFW-LQ", numbers=columns)
    for name in record["metrics"]:
        table.add_row(name, *(_percent(column["metrics"][name]) for column in columns.values()))
        if name.startswith("rank_1@"):
            block = name.removeprefix("rank_1@")
            for inner in [key for key in record["conditions"][block]["metrics"] if key.startswith("tpir@")]:
                row = (_percent(column["conditions"][block]["metrics"][inner]) for column in columns.values())
                table.add_row(f"  {inner}", *row)
    table.caption = ", ".join(f"{name} {value}" for name, value in record["counts"].items())
    show(table, *(f"* {warning}" for warning in record["warnings"]))


def _percent(entry: dict[str, Any]) -> str:
    from retrieval.results import support_mark

    if entry["value"] is None:
        return "-"
    return f"{100 * entry['value']:.2f} %" + support_mark(entry)
