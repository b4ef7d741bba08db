"""Exported models beside eager PyTorch: the same network with random weights, the same faces, one run.

For each depth and batch: eager PyTorch in fp32 (contiguous, and channels-last as `aroface embed` runs it) and bf16,
ONNX Runtime in fp32, fp16 and int8, OpenVINO in fp32, bf16 and int8. Every variant is compared with eager fp32 by the
smallest cosine. int8 is calibrated on other faces than are compared. Random weights say nothing about accuracy: that
is what the gate of `aroface export --precision int8` measures. The limit is the arithmetic of the forward pass at the
peak of the precision, or the weights read once a batch in that precision; on a CPU fp16 files are computed in fp32.

MODEL ... instead measures exported files of one checkpoint (.onnx, .engine) side by side, the first being the
reference. Engines are compared by wall time, since the processor only waits for them.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.bench.measure import Measurement, interleave, ratio
from launch.bench.output import Report, measured
from launch.bench.roofline import Peaks, Precision, measure_peaks
from launch.evaluate_options import counts, positive
from launch.outputs import output_file

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from aroface.inference import TrainedModel
    from aroface.types import Embedder

    Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "numpy", "tensorrt")
_EAGER, _EAGER_NHWC, _ORT = "eager fp32", "eager fp32 channels-last", "onnxruntime fp32"
_CALIBRATION_FACES = 64
_WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="exported files of one checkpoint")
    parser.add_argument("--depths", type=counts, default=[18, 100], metavar="D,..", help="depths of IResNet")
    parser.add_argument(
        "--width", type=float, default=1.0, metavar="W", help="factor on its channels, for a quick look"
    )
    parser.add_argument("--batches", type=counts, default=[1, 32], metavar="N,..", help="batch sizes")
    parser.add_argument("--images", type=positive, default=16, metavar="N", help="images in a round, at least")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads of every runtime")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="counted rounds")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("depths", "width", "batches", "images", "threads", "rounds")}
    settings["models"] = [path.name for path in args.models]
    report = Report("export", _PACKAGES, settings)
    details: dict[str, object] = report.details.setdefault("measurements", {})
    if args.models:
        _measure_files(args, report, details)
    else:
        for depth in args.depths:
            with tempfile.TemporaryDirectory(prefix="aroface-bench-") as folder:
                _measure_depth(args, depth, Path(folder), report, details)
    report.write(args.out)
    return 0


def _measure_depth(
    args: argparse.Namespace, depth: int, folder: Path, report: Report, details: dict[str, object]
) -> None:
    model = random_model(depth, args.width)
    variants = _variants(model, folder, args.threads)
    limits = _Limits(model, measure_peaks(threads=args.threads))
    for batch in args.batches:
        results = _compare(variants, batch, args)
        eager, eager_nhwc, ort = (results.measurements[name] for name in (_EAGER, _EAGER_NHWC, _ORT))
        details[f"R{depth}, batch {batch}"] = results.to_json()
        for name, measurement in results.measurements.items():
            label = f"R{depth}, batch {batch}: {name}"
            limit = 1e3 * limits.image_s(name, batch)
            report.add(label, 1e3 / measurement.items_per_cpu_s, "CPU-ms per image", limit=limit)
            if name == _EAGER:
                continue
            is_goal = name == _ORT and batch == 1
            report.add(f"{label} / eager", ratio(measurement, eager), "x", at_least=1.0 if is_goal else None)
            if name == _ORT:
                against = ratio(ort, eager_nhwc)
                report.add(f"{label} / eager channels-last", against, "x", at_least=1.0 if is_goal else None)
            if name.startswith("openvino"):
                is_goal = name == "openvino bf16"
                against = ratio(measurement, ort)
                report.add(f"{label} / onnxruntime fp32", against, "x", at_least=2.2 if is_goal else None)
            report.add(f"{label}, smallest cosine", results.cosines[name], "")


class _Limits:
    """Least CPU-seconds of an image; a precision without a peak here counts as fp32."""

    def __init__(self, model: "TrainedModel", peaks: Peaks) -> None:
        import torch

        from launch.bench.backbones import forward_flops

        side = model.contract.image_size
        self._peaks = peaks
        self._flops = forward_flops(model.backbone, torch.zeros(1, 3, side, side))
        self._parameters = sum(p.numel() for p in model.backbone.parameters())

    def image_s(self, variant: str, batch: int) -> float:
        """Of one image in a batch, in the precision that stands in the name of the variant."""
        precision = next(known for known in _WEIGHT_BYTES if known in variant.split())
        weights = self._parameters * _WEIGHT_BYTES[precision]
        return self._peaks.limit_s(batch * self._flops, weights, precision) / batch


def _measure_files(args: argparse.Namespace, report: Report, details: dict[str, object]) -> None:
    from launch.embedders import open_embedder

    embedders = {path.name: open_embedder(path, threads=args.threads) for path in args.models}
    by_wall = any(path.suffix == ".engine" for path in args.models)
    for batch in args.batches:
        results = _compare({name: embedder.embed for name, embedder in embedders.items()}, batch, args, embedders)
        details[f"batch {batch}"] = results.to_json()
        first = next(iter(results.measurements.values()))
        for name, measurement in results.measurements.items():
            label = f"batch {batch}: {name}"
            report.add(label, measurement.items_per_s, "img/s")
            if measurement is not first:
                faster = first.wall_s / measurement.wall_s if by_wall else ratio(measurement, first)
                report.add(f"{label} / {first.name}", faster, "x")
                report.add(f"{label}, smallest cosine", results.cosines[name], "")


class _Results:
    def __init__(self, measurements: Mapping[str, Measurement], cosines: Mapping[str, float]) -> None:
        self.measurements = measurements
        self.cosines = cosines

    def to_json(self) -> dict[str, object]:
        return {
            name: {**measured(measurement), "min_cosine": self.cosines[name]}
            for name, measurement in self.measurements.items()
        }


def _compare(
    variants: "Mapping[str, Embed]",
    batch: int,
    args: argparse.Namespace,
    embedders: "Mapping[str, Embedder] | None" = None,
) -> _Results:
    """Time every variant on the same batch, and compare what they give with the first."""
    from export.parity import synthetic_faces

    size = 112 if embedders is None else next(iter(embedders.values())).contract.image_size
    faces = synthetic_faces(size, count=batch, seed=1)
    given = {name: embed(faces) for name, embed in variants.items()}
    first = next(iter(given.values()))

    def work(embed: "Embed") -> "Callable[[], int]":
        return lambda: sum(len(embed(faces)) for _ in range(-(-args.images // batch)))

    timed = interleave({name: work(embed) for name, embed in variants.items()}, rounds=args.rounds)
    cosines = {name: _smallest_cosine(values, first) for name, values in given.items()}
    return _Results({measurement.name: measurement for measurement in timed}, cosines)


def _variants(model: "TrainedModel", folder: Path, threads: int) -> "dict[str, Embed]":
    import torch

    from aroface.inference import TorchEmbedder
    from aroface.preprocess import normalise
    from export.openvino_runtime import OpenVinoEmbedder
    from export.runtime import OnnxEmbedder

    contiguous = random_model_like(model)

    def eager(faces: "NDArray[np.uint8]") -> "NDArray[np.float32]":
        with torch.inference_mode():
            pixels = normalise(torch.from_numpy(faces), model.contract).contiguous()
            values: NDArray[np.float32] = contiguous(pixels).numpy()
            return values

    paths = _export(model, folder)
    found: dict[str, Embed] = {_EAGER: eager}
    for precision in ("fp32", "bf16"):
        name = _EAGER_NHWC if precision == "fp32" else "eager bf16 channels-last"
        found[name] = TorchEmbedder(model, precision=precision, device="cpu").embed
    for precision in ("fp32", "fp16", "int8"):
        found[f"onnxruntime {precision}"] = OnnxEmbedder(paths[precision], threads=threads).embed
    for name, file, precision in (("fp32", "fp32", "fp32"), ("bf16", "fp32", "bf16"), ("int8", "int8", "fp32")):
        embedder = OpenVinoEmbedder(paths[file], precision=precision, threads=threads)  # type: ignore[arg-type]
        found[f"openvino {name}"] = embedder.embed
    return found


def _export(model: "TrainedModel", folder: Path) -> dict[str, Path]:
    """One file per precision, from one tracing."""
    from export.parity import synthetic_faces
    from export.to_onnx import OnnxSettings, build_onnx, finish_onnx

    faces = synthetic_faces(model.contract.image_size, count=_CALIBRATION_FACES, seed=2)
    plain = build_onnx(model, OnnxSettings())
    paths = {}
    for precision in ("fp32", "fp16", "int8"):
        settings = OnnxSettings(precision=precision)
        paths[precision] = folder / f"{precision}.onnx"
        proto = finish_onnx(plain, model, settings, faces)
        paths[precision].write_bytes(proto.SerializeToString(deterministic=True))
    return paths


def random_model(depth: int, width: float = 1.0) -> "TrainedModel":
    """IResNet with drawn weights, and batch norms with the statistics of some faces, so that values keep their size."""
    import torch

    from aroface.config.model import IResNetConfig
    from aroface.contract import InputContract
    from aroface.inference import TrainedModel
    from aroface.models import build_backbone
    from aroface.preprocess import normalise
    from export.parity import synthetic_faces

    config = IResNetConfig.model_validate({"kind": "iresnet", "depth": depth, "width": width})
    contract = InputContract(image_size=config.image_size, colour_order="rgb")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(config)
        for module in backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.momentum = None  # the statistics of all that it is shown
        with torch.no_grad():
            backbone.train()(normalise(torch.from_numpy(synthetic_faces(config.image_size, count=8)), contract))
    return TrainedModel(backbone.eval(), contract, f"iresnet{depth}", "0" * 64)


def random_model_like(model: "TrainedModel") -> "Callable[..., torch.Tensor]":
    """A copy of the backbone in PyTorch's own layout."""
    import copy

    import torch

    return copy.deepcopy(model.backbone).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _smallest_cosine(values: "NDArray[np.float32]", reference: "NDArray[np.float32]") -> float:
    a, b = values.astype(np.float64), reference.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
