"""FAE-1: identification and verification against the angle, shift and scale error of the probes' alignment.

References stay aligned, unless --sides both. Beside angle, shift, scale and all three at once, the landmarks are made
wrong and the face aligned anew from them; every probe is resampled once from its source. Every severity is measured
with the threshold set anew, and with that of the clean probes kept ("frozen"): errors of a system whose threshold was
set once. Give the results of several models to `aroface report`: it draws them in one figure.

--on faces takes any identity/image set: the first image of each identity is enrolled. Every other set takes the files
of its protocol by --lists: a list of pairs, a .bin, or a folder of lists.
"""

import argparse
from pathlib import Path
from typing import Any

from aroface.errors import ConfigError
from launch.console import new_table, show
from launch.evaluate_options import one_rate, positive
from launch.fae_sets import SETS, TASKS
from launch.outputs import output_file
from launch.training_overlap import add_trained_on, overlap_warnings

_FPIR = one_rate("0.1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="run directory, checkpoint or .onnx")
    parser.add_argument("--on", choices=SETS, default="faces", help="the set")
    parser.add_argument("--lists", type=Path, metavar="PATH", help="files of the protocol, for all sets but faces")
    parser.add_argument("--faces", type=Path, metavar="PATH", help="the images: folder, .zip or shards")
    parser.add_argument(
        "--task",
        choices=sorted({task for tasks in TASKS.values() for task in tasks}),
        help="what is evaluated on ijbb, ijbc or ijbs",
    )
    parser.add_argument("--pooling", metavar="CODE", help="how templates are fused (default: that of the protocol)")
    parser.add_argument(
        "--max-missing-pairs",
        type=int,
        default=0,
        metavar="N",
        help="listed pairs whose images are missing that may be left out",
    )
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--subset", type=positive, default=500, metavar="N", help="probes at the most")
    subset.add_argument("--all", action="store_true", help="every probe")
    parser.add_argument("--trials", type=positive, default=3, metavar="T", help="draws of the random errors")
    parser.add_argument("--sides", choices=("probe", "both"), default="probe", help="whose alignment is wrong")
    parser.add_argument(
        "--far", type=one_rate, default=one_rate("1e-2"), metavar="RATE", help="rate of false matches (sets of pairs)"
    )
    parser.add_argument(
        "--fpir", type=one_rate, metavar="RATE", help="rate of false alarms (sets that are searched; default: 0.1)"
    )
    add_trained_on(parser)
    parser.add_argument("--flip", choices=("sum", "none"), default="sum", help="mirror images added")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images per call")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    parser.add_argument("--out", type=output_file, required=True, metavar="R.json", help="result file")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from launch.embedders import open_embedder
    from launch.fae_sets import open_fae_set
    from launch.progress import Progress
    from retrieval.protocols.fae import FaeSettings, evaluate_fae_set, num_forward_images
    from retrieval.results import file_hashes, write_result

    faces, data_set = open_fae_set(args)
    if args.fpir is not None and data_set.pairs is not None:
        raise ConfigError(
            f"--fpir {args.fpir[0]} belongs to sets that are searched (1:N), and {data_set.name} is a list of pairs "
            "(1:1); leave it out, --far is the rate of pairs."
        )
    settings = FaeSettings(
        subset=None if args.all else args.subset,
        trials=args.trials,
        sides=args.sides,
        far=args.far[0],
        fpir=(args.fpir or _FPIR)[0],
        flip=args.flip,
        batch_size=args.batch,
    )
    embedder = open_embedder(args.model, threads=args.threads, batch_size=args.batch)
    with Progress("FAE-1", total=num_forward_images(data_set, settings), unit="images") as progress:
        record = evaluate_fae_set(embedder, faces, data_set, settings, on_progress=progress.update)
    record["warnings"] += overlap_warnings(args, faces.identities)
    files = [*data_set.files, *([args.faces] if args.faces is not None and args.faces.is_file() else [])]
    record["inputs"] = {"faces": str(args.faces), "files": file_hashes(files)}
    write_result(args.out, record)
    _print(record)
    return 0


def _print(record: dict[str, Any]) -> None:
    names = list(record["sweeps"][0]["points"][0]["metrics"])
    numbers = ("level", "NME", *names)
    table = new_table("sweep", *numbers, title=f"FAE-1 on {record['set']}", numbers=numbers)
    for sweep in record["sweeps"]:
        title = f"{sweep['name']} [{sweep['unit']}]" if sweep["unit"] else sweep["name"]
        for point in sweep["points"]:
            values = (f"{100 * point['metrics'][name]:.2f} %" for name in names)
            table.add_row(title, f"{point['severity']:g}", f"{point['nme']:.3f}", *values)
            title = ""
        table.add_section()
    areas = (f"{name} {entry['value']:.3f}" for name, entry in record["metrics"].items() if name.startswith("area_"))
    table.caption = ", ".join(f"{name} {value}" for name, value in record["counts"].items()) + "\n" + "\n".join(areas)
    show(table, *(f"* {warning}" for warning in record["warnings"]))
