"""Write a checkpoint as one ONNX file or TensorRT engine, and prove on faces that it gives the same embeddings.

The file takes uint8 RGB crops (N, S, S, 3) and holds its own preprocessing; it gives `embedding` (N, D), un-normalised,
and `norm` (N,). Its metadata carry the input contract. FILE.json beside it holds the figures of the comparison. If the
two differ, the command fails and leaves no file.

int8 is calibrated on faces, and has to keep its rates on an evaluation set. --to tensorrt takes an exported .onnx file
too, and has to run on the GPU that the engine is for. docs/export.md tells which form to choose.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import ConfigError
from aroface.files import sha256_of, write_json
from launch.evaluate_options import positive
from launch.outputs import output_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from export.accuracy import AccuracyGate, AccuracyReport
    from export.parity import ParityReport
    from export.to_onnx import OnnxSettings

_OPSETS = "20 to 28"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="run directory, one of its step-NNNNNNNN, or (for --to tensorrt) an .onnx file",
    )
    parser.add_argument("--to", choices=("onnx", "tensorrt"), default="onnx", help="target format")
    parser.add_argument(
        "--out", type=output_file, required=True, metavar="FILE", help="the file to write, such as model.onnx"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="arithmetic of the exported model (default: fp32, or that of the .onnx file)",
    )
    parser.add_argument(
        "--input",
        dest="input_layout",
        choices=("uint8_nhwc", "float_nchw"),
        default="uint8_nhwc",
        help="uint8 RGB pixels, or floats that the caller has preprocessed",
    )
    parser.add_argument("--flip-fusion", action="store_true", help="embedding = e(image) + e(mirrored image)")
    parser.add_argument(
        "--opset",
        type=positive,
        metavar="N",
        help=f"ONNX opset, {_OPSETS} (default: 25; for TensorRT, the newest that it reads)",
    )
    parser.add_argument(
        "--faces",
        type=Path,
        metavar="PATH",
        help="faces for the comparison: folder, .zip or shard directory (default: synthetic images)",
    )
    _add_int8(parser)
    _add_gate(parser)
    _add_tensorrt(parser)


def _add_int8(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("int8")
    group.add_argument(
        "--calibration", type=Path, metavar="PATH", help="faces to take the ranges from (default: --faces)"
    )
    group.add_argument("--calibration-faces", type=positive, default=256, metavar="N", help="how many of them")
    group.add_argument(
        "--int8-for",
        choices=("cpu", "tensorrt"),
        help="where the scales stand: for ONNX Runtime and OpenVINO, or for TensorRT (default: as --to says)",
    )


def _add_gate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("accuracy gate", "for every precision; int8 needs it")
    group.add_argument("--accuracy-set", type=Path, metavar="PATH", help="faces, several images per identity")
    group.add_argument("--far", type=float, default=1e-3, metavar="P", help="FAR at which TAR is compared")
    group.add_argument("--fpir", type=float, default=1e-2, metavar="P", help="FPIR at which TPIR is compared")
    for option, name in (("--max-rank1-drop", "Rank-1"), ("--max-tar-drop", "TAR"), ("--max-tpir-drop", "TPIR")):
        group.add_argument(
            option,
            type=float,
            default=0.01,
            metavar="D",
            help=f"how far {name} may fall; 0.01 is a percentage point, 1 any fall",
        )


def _add_tensorrt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT")
    group.add_argument(
        "--batch-profile",
        action="append",
        metavar="MIN,OPT,MAX",
        help="batch sizes to build for; several may be given (default: 1,1,8 and 1,64,64)",
    )
    group.add_argument("--workspace-gib", type=float, metavar="G", help="scratch memory at the most")
    group.add_argument("--timing-cache", type=output_file, metavar="FILE", help="makes a second build faster")
    group.add_argument(
        "--optimisation-level", type=int, metavar="0..5", help="time spent looking for fast kernels (default: 3)"
    )


def run(args: argparse.Namespace) -> int:
    """Export and print what was compared."""
    _check_gate_options(args)
    return _to_onnx(args) if args.to == "onnx" else _to_tensorrt(args)


def _to_onnx(args: argparse.Namespace) -> int:
    from aroface.inference import load_model
    from export.to_onnx import export_onnx

    if args.checkpoint.suffix == ".onnx":
        raise ConfigError(f"{args.checkpoint} is an ONNX file already; name the checkpoint, or use --to tensorrt.")
    of_engines = ("batch_profile", "workspace_gib", "timing_cache", "optimisation_level")
    if ignored := [f"--{name.replace('_', '-')}" for name in of_engines if getattr(args, name) is not None]:
        raise ConfigError(f"{', '.join(ignored)}: only TensorRT engines have that. Leave it out, or use --to tensorrt.")
    started = time.perf_counter()
    model = load_model(args.checkpoint)
    settings = _onnx_settings(args)
    faces, faces_name = _faces(args, model.contract.image_size)
    calibration = _calibration(args, model.contract.image_size) if settings.precision == "int8" else None
    done = export_onnx(model, args.out, faces, settings, calibration=calibration, gate=_gate(args))
    report = {
        "model_id": model.model_id,
        "checkpoint_sha256": model.weights_sha256,
        "file_sha256": sha256_of(args.out),
        "file_bytes": args.out.stat().st_size,
        "format": "onnx",
        "precision": settings.precision,
        "opset": settings.opset_version,
        "input_layout": settings.input_layout,
        "flip_fusion": settings.flip_fusion,
        "quantisation": settings.quantisation if settings.precision == "int8" else None,
        "calibration": _calibration_record(args, calibration),
        "contract": model.contract.model_dump(),
        "faces": faces_name,
        "parity": done.parity.to_json(),
        "accuracy": None if done.accuracy is None else done.accuracy.to_json(),
        "elapsed_s": round(time.perf_counter() - started, 2),
    }
    write_json(args.out.with_name(f"{args.out.name}.json"), report)
    size = f"{report['file_bytes'] / 2**20:.1f} MiB"
    print(f"{args.out}: {model.model_id}, {size}, {settings.precision}, {settings.input_layout}")
    _print_gates(done.parity, done.accuracy, faces_name)
    return 0


def _to_tensorrt(args: argparse.Namespace) -> int:
    from export.engine_record import BatchProfile
    from export.tensorrt_probe import require_tensorrt
    from export.to_tensorrt import DEFAULT_PROFILES, EngineSettings, export_tensorrt

    profiles = tuple(BatchProfile.parse(text) for text in args.batch_profile or ())
    gpu = require_tensorrt()  # before the minutes that the rest takes
    settings = EngineSettings(
        profiles=profiles or DEFAULT_PROFILES,
        workspace_gib=args.workspace_gib,
        timing_cache=args.timing_cache,
        optimisation_level=args.optimisation_level,
    )
    proto, reference, calibration = _graph_for_engine(args, gpu.tensorrt_release)
    faces, faces_name = _faces(args, reference.contract.image_size)
    report = {
        "model_id": reference.model_id,
        "format": "tensorrt",
        "faces": faces_name,
        "calibration": _calibration_record(args, calibration),
    }
    done = export_tensorrt(proto, args.out, reference, faces, settings, gate=_gate(args), report=report)
    record = done.record
    size = f"{args.out.stat().st_size / 2**20:.1f} MiB"
    print(f"{args.out}: {record.model.model_id}, {size}, {record.model.precision}, {record.model.input_layout}")
    print(
        f"  built in {record.build_s:.0f} s by TensorRT {record.tensorrt_version} for {record.device} (compute "
        f"capability {record.compute_capability}), batches of {' and '.join(map(str, record.profiles))}"
    )
    _print_gates(done.parity, done.accuracy, faces_name)
    return 0


def _graph_for_engine(args: argparse.Namespace, release: str) -> tuple[Any, Any, "NDArray[np.uint8] | None"]:
    """(graph, what the engine is compared with, calibration faces) for a release of TensorRT."""
    from export.onnx_file import read_onnx
    from export.to_onnx import make_onnx, open_for_gates
    from export.to_tensorrt import opset_for

    if args.checkpoint.suffix == ".onnx":
        proto, metadata = read_onnx(args.checkpoint)
        if args.precision not in (None, metadata.precision):
            raise ConfigError(
                f"--precision {args.precision}: {args.checkpoint} is {metadata.precision}, and an engine keeps the "
                "precision of its ONNX file. Leave the option out, or name the checkpoint."
            )
        settled = {
            "--opset": args.opset is not None,
            "--input": args.input_layout not in ("uint8_nhwc", metadata.input_layout),
            "--flip-fusion": args.flip_fusion,
            "--calibration": args.calibration is not None,
            "--int8-for": args.int8_for is not None,
        }
        if any(settled.values()):
            raise ConfigError(
                f"{', '.join(name for name, is_given in settled.items() if is_given)}: an engine keeps what stands in "
                f"its ONNX file. Export {args.checkpoint} with that, or name the checkpoint."
            )
        newest = opset_for(release, metadata.precision)
        if proto.opset_import[0].version > newest:
            logger.warning(
                "%s has opset %d, and TensorRT %s is known to read %d at most; should it refuse the graph, name the "
                "checkpoint in place of the file, or export it with --opset %d.",
                *(args.checkpoint, proto.opset_import[0].version, release, newest, newest),
            )
        return proto, open_for_gates(args.checkpoint, metadata.precision), None
    from aroface.inference import TorchEmbedder, load_model

    model = load_model(args.checkpoint)
    args.opset = args.opset or opset_for(release, args.precision or "fp32")
    settings = _onnx_settings(args)
    calibration = _calibration(args, model.contract.image_size) if settings.precision == "int8" else None
    return make_onnx(model, settings, calibration), TorchEmbedder(model), calibration


def _onnx_settings(args: argparse.Namespace) -> "OnnxSettings":
    from export.to_onnx import OPSET_VERSION, OnnxSettings

    return OnnxSettings(
        input_layout=args.input_layout,
        flip_fusion=args.flip_fusion,
        precision=args.precision or "fp32",
        quantisation=args.int8_for or ("tensorrt" if args.to == "tensorrt" else "cpu"),
        opset_version=args.opset or OPSET_VERSION,
    )


def _faces(args: argparse.Namespace, size: int) -> "tuple[NDArray[np.uint8], str]":
    from export.parity import sample_faces, synthetic_faces
    from shards.faces import open_face_set

    if args.faces is None:
        return synthetic_faces(size), "synthetic images"
    return sample_faces(open_face_set(args.faces), size), str(args.faces)


def _calibration(args: argparse.Namespace, size: int) -> "NDArray[np.uint8]":
    import numpy as np

    from export.parity import distinct_faces
    from shards.faces import open_face_set

    path = args.calibration or args.faces
    if path is None:
        raise ConfigError(
            "--precision int8 takes the range of every activation from faces; name some with --calibration, such as "
            "the shards of the training."
        )
    return np.stack(distinct_faces(open_face_set(path), size, count=args.calibration_faces))


def _calibration_record(args: argparse.Namespace, faces: "NDArray[np.uint8] | None") -> dict[str, Any] | None:
    return None if faces is None else {"set": str(args.calibration or args.faces), "faces": len(faces)}


def _check_gate_options(args: argparse.Namespace) -> None:
    if args.precision == "int8" and args.accuracy_set is None and (args.calibration or args.faces):
        raise ConfigError(
            "--precision int8 is judged by recognition, not by the cosine alone: name faces with several images per "
            "identity with --accuracy-set."
        )
    for name in ("far", "fpir"):
        if not 0 < getattr(args, name) <= 1:
            raise ConfigError(
                f"--{name} {getattr(args, name):g} is not a rate; write a number in (0, 1], such as 0.01."
            )
    for name in ("max_rank1_drop", "max_tar_drop", "max_tpir_drop"):
        if not 0 <= getattr(args, name) <= 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(args, name):g} is not a difference of rates; write a number in "
                "[0, 1], such as 0.01 for one percentage point."
            )


def _gate(args: argparse.Namespace) -> "AccuracyGate | None":
    if args.accuracy_set is None:
        return None
    from export.accuracy import AccuracyGate, AccuracyLimits
    from launch.export_accuracy import rates_on
    from shards.faces import open_face_set

    faces = open_face_set(args.accuracy_set)
    limits = AccuracyLimits(args.max_rank1_drop, args.max_tar_drop, args.max_tpir_drop)
    waived = [name for name in ("tar", "tpir") if getattr(limits, name) >= 1]
    measure = rates_on(faces, far=args.far, fpir=args.fpir, waived=waived)
    return AccuracyGate(measure, str(args.accuracy_set), limits)


def _print_gates(parity: "ParityReport", accuracy: "AccuracyReport | None", faces_name: str) -> None:
    batches = ", ".join(map(str, parity.batch_sizes))
    print(f"  parity on {parity.num_faces} faces ({faces_name}), batches of {batches}:")
    print(f"  smallest cosine   {parity.min_cosine:.7f}   (gate: {parity.cosine_limit})")
    print(f"  largest difference  {parity.max_abs_difference:.1e}")
    if accuracy is None:
        return
    print(f"  accuracy on {accuracy.set_name}:")
    for entry in accuracy.changes:
        before, after = 100 * entry.checkpoint, 100 * entry.exported
        print(
            f"  {entry.name:<18} {before:6.2f} % -> {after:6.2f} %   ({100 * entry.change:+.2f}, may fall by "
            f"{100 * entry.allowed_fall:g})"
            + ("" if entry.can_tell else "   too low to tell: take an easier set or a higher rate")
        )
