"""Write a checkpoint as one ONNX file, and prove on faces that it gives the same embeddings.

The file takes uint8 RGB crops (N, S, S, 3) and holds its own preprocessing; it gives `embedding` (N, D), un-normalised,
and `norm` (N,). Its metadata carry the input contract. FILE.json beside it holds the figures of the comparison. If the
two differ, the command fails and leaves no file.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from aroface.errors import ExportError
from aroface.files import sha256_of, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run directory, or one of its step-NNNNNNNN"
    )
    parser.add_argument("--to", choices=("onnx", "tensorrt"), default="onnx", help="target format (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, such as model.onnx")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        default="fp32",
        help="arithmetic of the exported model (%(default)s)",
    )
    parser.add_argument(
        "--input",
        dest="input_layout",
        choices=("uint8_nhwc", "float_nchw"),
        default="uint8_nhwc",
        help="uint8 RGB pixels, or floats that the caller has preprocessed (%(default)s)",
    )
    parser.add_argument("--flip-fusion", action="store_true", help="embedding = e(image) + e(mirrored image)")
    parser.add_argument(
        "--faces",
        type=Path,
        metavar="PATH",
        help="faces for the comparison: folder, .zip or shard directory (default: synthetic images)",
    )


def run(args: argparse.Namespace) -> int:
    """Export and print what was compared."""
    _refuse_what_does_not_exist(args)
    from aroface.inference import load_model
    from export.parity import sample_faces, synthetic_faces
    from export.to_onnx import OnnxSettings, export_onnx

    started = time.perf_counter()
    model = load_model(args.checkpoint)
    size = model.contract.image_size
    if args.faces is None:
        faces, faces_name = synthetic_faces(size), "synthetic images"
    else:
        from shards.faces import open_face_set

        faces, faces_name = sample_faces(open_face_set(args.faces), size), str(args.faces)
    settings = OnnxSettings(input_layout=args.input_layout, flip_fusion=args.flip_fusion)
    parity = export_onnx(model, args.out, faces, settings)
    report: dict[str, Any] = {
        "model_id": model.model_id,
        "checkpoint_sha256": model.weights_sha256,
        "file_sha256": sha256_of(args.out),
        "file_bytes": args.out.stat().st_size,
        "format": args.to,
        "precision": args.precision,
        "input_layout": args.input_layout,
        "flip_fusion": args.flip_fusion,
        "contract": model.contract.model_dump(),
        "faces": faces_name,
        "parity": parity.to_json(),
        "elapsed_s": round(time.perf_counter() - started, 2),
    }
    write_json(args.out.with_name(f"{args.out.name}.json"), report)
    batches = ", ".join(map(str, parity.batch_sizes))
    print(
        f"{args.out}: {model.model_id}, {report['file_bytes'] / 2**20:.1f} MiB, {args.precision}, {args.input_layout}"
    )
    print(f"  parity with the checkpoint on {parity.num_faces} faces ({faces_name}), batches of {batches}:")
    print(f"  smallest cosine   {parity.min_cosine:.7f}   (gate: {parity.cosine_limit})")
    print(f"  largest difference  {parity.max_abs_difference:.1e}")
    return 0


def _refuse_what_does_not_exist(args: argparse.Namespace) -> None:
    if args.to == "tensorrt":
        raise ExportError(
            "--to tensorrt: a TensorRT engine is built from the ONNX file on the GPU that will run it, and aroface "
            "does not build engines yet. Export with --to onnx and give that file to `trtexec --onnx=FILE`."
        )
    if args.precision != "fp32":
        raise ExportError(
            f"--precision {args.precision} does not exist for --to onnx; fp32 does. Use --precision fp32."
        )
    if args.out.is_dir():
        raise ExportError(f"--out {args.out} is a directory; name a file in it, such as {args.out / 'model.onnx'}.")
