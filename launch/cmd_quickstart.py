"""The whole chain on one machine: pack, train, export, gallery, identify, report.

Without --data it draws its own synthetic identities (no photographs). With --data it takes a folder or .zip of
identity/image.jpg; a fifth of the identities is kept for the test unless --test names another set. Every stage is a
public command, printed before it runs, so that any of them can be repeated by hand with other settings.
"""

import argparse
import random
from importlib.resources import files
from pathlib import Path

from aroface.config import TrainConfig, load_config
from aroface.errors import DataError
from aroface.files import atomic_path, new_directory
from launch.outputs import output_folder
from launch.stages import Stage, StageRecord, run_stages
from retrieval.protocols.lfw_pairs import pairs_beside
from shards.faces import open_face_set

_TEST_SHARE = 0.2
_SYNTHETIC_TRAIN_IDENTITIES = 1000
_SYNTHETIC_TEST_IDENTITIES = 300
_SYNTHETIC_IMAGES = 10
#: Public pair lists name a few images that copies of the set lack; the report counts them.
_MAX_MISSING_PAIRS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="folder or .zip of identity/image.jpg (default: synthetic)"
    )
    parser.add_argument(
        "--test", type=Path, metavar="PATH", help="test set of the same form (default: a fifth of --data)"
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="LFW-style pairs of the test set (default: NAME_pairs.txt beside --test NAME.zip, else drawn by seed)",
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        default=Path("runs/quickstart"),
        metavar="DIR",
        help="new folder for everything",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="training configuration (default: the quick start's own)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the training configuration")


def run(args: argparse.Namespace) -> int:
    """Run the stages."""
    config = args.config or _own_config(synthetic=args.data is None)
    _check_inputs(args)
    load_config(config, TrainConfig, args.overrides)  # a misspelt setting costs no packing
    out: Path = new_directory(args.out, what="Output folder")
    first_stages, train, train_list, test = _sets(args, out)
    pairs = args.pairs or (pairs_beside(args.test) if args.test else None)
    stages = [*first_stages, *_stages(out, config, args.overrides, train, train_list, test, pairs)]
    records = run_stages(stages, record_path=out / "run.json", say=lambda line: print(line, flush=True))
    print(_closing(records, out))
    return 0


def _check_inputs(args: argparse.Namespace) -> None:
    if args.test and not args.data:
        raise DataError("--test needs --data: the synthetic set brings its own test identities.")
    for option in ("data", "test", "pairs", "config"):
        path: Path | None = getattr(args, option)
        if path is not None and not path.exists():
            raise DataError(f"--{option} {path} does not exist.")


def _check_test_set(test: Path) -> None:
    """Identification needs a gallery image and a probe of at least one person."""
    identities = open_face_set(test).identities
    if len(set(identities)) == len(identities):
        raise DataError(
            f"No identity of the test set {test} has two images, so there is no probe to identify. "
            "Name a set with two or more images of some people."
        )


def _own_config(*, synthetic: bool) -> Path:
    return Path(
        str(files("launch") / "recipes" / ("quickstart_synthetic.yaml" if synthetic else "quickstart_faces.yaml"))
    )


def _sets(args: argparse.Namespace, out: Path) -> tuple[list[Stage], Path, Path | None, Path]:
    """Stages that make the sets; training source; file with its identities (None: all); test set."""
    if args.data is None:
        faces = out / "faces"
        draw = Stage(
            "Draw synthetic identities",
            (
                *("synthesize", str(faces / "train"), "--identities", str(_SYNTHETIC_TRAIN_IDENTITIES)),
                *("--images", str(_SYNTHETIC_IMAGES), "--seed", "0"),
            ),
        )
        draw_test = Stage(
            "Draw the test identities",
            (
                *("synthesize", str(faces / "test"), "--identities", str(_SYNTHETIC_TEST_IDENTITIES)),
                *("--images", str(_SYNTHETIC_IMAGES), "--seed", "1"),
            ),
        )
        return [draw, draw_test], faces / "train", None, faces / "test"
    if args.test is not None:
        _check_test_set(args.test)
        return [], args.data, None, args.test
    train_list, test_list = _split_identities(args.data, out)
    shards = out / "shards" / "test"
    keep_test = Stage("Pack the test identities", ("pack", str(args.data), str(shards), "--identities", str(test_list)))
    return [keep_test], args.data, train_list, shards


def _split_identities(data: Path, out: Path) -> tuple[Path, Path]:
    identities = sorted(set(open_face_set(data).identities))
    num_test = max(1, round(_TEST_SHARE * len(identities)))
    if len(identities) - num_test < 2:
        raise DataError(
            f"--data {data} holds {len(identities)} identities; at least 3 are needed to train on two and test on one. "
            "Add identities, or name a test set with --test."
        )
    test = set(random.Random(0).sample(identities, num_test))  # noqa: S311 - a reproducible split, no secret
    paths = out / "train-identities.txt", out / "test-identities.txt"
    for path, chosen in zip(paths, ([i for i in identities if i not in test], sorted(test)), strict=True):
        with atomic_path(path) as temporary:
            text = "".join(f"{identity}\n" for identity in chosen)
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    return paths


def _stages(
    out: Path, config: Path, overrides: list[str], train: Path, train_list: Path | None, test: Path, pairs: Path | None
) -> list[Stage]:
    shards, run_dir, model = out / "shards" / "train", out / "run", out / "model.onnx"
    identities = ("--identities", str(train_list)) if train_list else ()
    lfw_lq = ("evaluate", "lfw-lq", "--model", str(model), "--faces", str(test), "--untrained", str(run_dir))
    results = [out / "results" / f"{name}.json" for name in ("identification", "lfw-lq", "fae")]
    return [
        Stage("Pack images into shards", ("pack", str(train), str(shards), *identities)),
        Stage(
            "Train",
            ("train", str(config), f"data.shards={shards}", *overrides, "--run", str(run_dir), "--resume", "never"),
        ),
        Stage("Export to ONNX", ("export", str(run_dir), "--to", "onnx", "--out", str(model), "--faces", str(test))),
        Stage(
            "Embed the gallery", ("embed", str(model), str(test), "--take", "first", "--out", str(out / "gallery.npz"))
        ),
        Stage("Embed the probes", ("embed", str(model), str(test), "--take", "rest", "--out", str(out / "probes.npz"))),
        Stage(
            "Build the gallery", ("gallery", "build", str(out / "gallery"), "--embeddings", str(out / "gallery.npz"))
        ),
        Stage(
            "Search it",
            (
                *("gallery", "search", str(out / "gallery"), "--probes", str(out / "probes.npz")),
                *("--top", "5", "--out", str(out / "results" / "candidates.json")),
            ),
        ),
        Stage(
            "Identify",
            (
                *("evaluate", "identification", "--gallery", str(out / "gallery.npz")),
                *("--probes", str(out / "probes.npz"), "--out", str(results[0])),
            ),
        ),
        Stage(
            "Identify low-quality probes",
            (*lfw_lq, *_pairs_arguments(pairs), "--out", str(results[1])),
        ),
        Stage(
            "Misalign the probes",
            ("evaluate", "fae", "--model", str(model), "--faces", str(test), "--trials", "1", "--out", str(results[2])),
        ),
        Stage("Show the attack", ("attack", str(run_dir), "--out", str(out / "attack.png"))),
        Stage(
            "Report",
            (
                *("report", *map(str, results), "--run", str(run_dir), "--stages", str(out / "run.json")),
                *("--grid", str(out / "attack.png"), "--out", str(out / "report")),
            ),
        ),
    ]


def _pairs_arguments(pairs: Path | None) -> tuple[str, ...]:
    if pairs is None:
        return ()
    return ("--pairs", str(pairs), "--max-missing-pairs", str(_MAX_MISSING_PAIRS))


def _closing(records: list[StageRecord], out: Path) -> str:
    width = max(len(record.name) for record in records)
    lines = [f"  {r.name:<{width}}  {r.seconds:7.1f} s  {r.peak_memory_gib:5.2f} GiB" for r in records]
    total = sum(record.seconds for record in records)
    peak = max(record.peak_memory_gib for record in records)
    lines.append(f"  {'together':<{width}}  {total:7.1f} s  {peak:5.2f} GiB at the most")
    return "\n" + "\n".join(lines) + f"\n\nOpen {out / 'report' / 'report.html'} in a browser."
