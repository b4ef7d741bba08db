"""FAE-1: identification and verification against the angle, shift and scale error of the probes' alignment.

The gallery stays aligned, unless --sides both. Beside angle, shift, scale and all three at once, the landmarks are made
wrong and the face aligned anew from them. Every severity is measured with the threshold re-calibrated to FAR 1e-2, and
with that of the clean probes kept ("frozen"): FNMR and FMR of a system whose threshold was set once.
"""

import argparse
from pathlib import Path
from typing import Any

from launch.evaluate_options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="run directory, checkpoint or .onnx")
    parser.add_argument("--faces", type=Path, required=True, metavar="PATH", help="folder, .zip or shards")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--subset", type=positive, default=500, metavar="N", help="probes at the most (%(default)s)")
    subset.add_argument("--all", action="store_true", help="every probe")
    parser.add_argument(
        "--trials", type=positive, default=1, metavar="T", help="draws of shifts and of severities (%(default)s)"
    )
    parser.add_argument(
        "--sides", choices=("probe", "both"), default="probe", help="whose alignment is wrong (%(default)s)"
    )
    parser.add_argument("--flip", choices=("sum", "none"), default="sum", help="mirror images added (%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images per call (%(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="result file")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from launch.embedders import open_embedder
    from launch.progress import Progress
    from retrieval.protocols.fae import FaeSettings, evaluate_fae, num_forward_images
    from retrieval.results import file_hashes, write_result
    from shards.faces import open_face_set

    faces = open_face_set(args.faces)
    settings = FaeSettings(
        subset=None if args.all else args.subset,
        trials=args.trials,
        sides=args.sides,
        flip=args.flip,
        batch_size=args.batch,
    )
    embedder = open_embedder(args.model, threads=args.threads, batch_size=args.batch)
    with Progress("FAE-1", total=num_forward_images(faces, settings), unit="images") as progress:
        record = evaluate_fae(embedder, faces, settings, on_progress=progress.update)
    files = [args.faces] if args.faces.is_file() else []
    record["inputs"] = {"faces": str(args.faces), "files": file_hashes(files)}
    write_result(args.out, record)
    _print(record)
    return 0


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(record["sweeps"][0]["points"][0]["metrics"])
    table = Table(title="FAE-1", title_justify="left", caption_justify="left")
    for heading in ("sweep", "level", "NME", *names):
        table.add_column(heading, justify="left" if heading == "sweep" else "right")
    for sweep in record["sweeps"]:
        title = f"{sweep['name']} [{sweep['unit']}]" if sweep["unit"] else sweep["name"]
        for point in sweep["points"]:
            values = (f"{100 * point['metrics'][name]:.2f} %" for name in names)
            table.add_row(title, f"{point['severity']:g}", f"{point['nme']:.3f}", *values)
            title = ""
        table.add_section()
    areas = (f"{name} {entry['value']:.3f}" for name, entry in record["metrics"].items() if name.startswith("area_"))
    table.caption = ", ".join(f"{name} {value}" for name, value in record["counts"].items()) + "\n" + "\n".join(areas)
    Console().print(table)
