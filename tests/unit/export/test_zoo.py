"""Every backbone that a configuration can name is exported, without batch norms, in every precision."""

import typing
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import TypeAdapter

from aroface.config.model import ModelConfig
from aroface.contract import InputContract
from aroface.inference import TorchEmbedder, TrainedModel
from aroface.models import build_backbone
from export.openvino_runtime import OpenVinoEmbedder
from export.parity import check_parity, synthetic_faces
from export.runtime import OnnxEmbedder
from export.to_onnx import MAX_OPSET_VERSION, OnnxSettings, build_onnx, finish_onnx, open_for_gates

#: One small network of each kind, and how near int8 comes with drawn weights.
SMALL: dict[str, tuple[dict[str, Any], float]] = {
    "iresnet": ({"depth": 18, "width": 0.125, "image_size": 32, "embedding_dim": 16}, 0.95),
    "ir": ({"depth": 18, "width": 0.125, "image_size": 32, "embedding_dim": 16}, 0.95),
    "mobilefacenet": ({"size": "base", "image_size": 48, "embedding_dim": 16}, 0.5),
    "vit": ({"width": 32, "depth": 2, "heads": 4, "patch": 8, "image_size": 32, "embedding_dim": 16}, 0.95),
}


def _kinds() -> list[str]:
    """The `kind` of every member of `ModelConfig`, which is one class or an annotated union."""
    union = typing.get_args(ModelConfig)
    classes = (typing.get_args(union[0]) or union[:1]) if union else (ModelConfig,)
    return [typing.get_args(member.model_fields["kind"].annotation)[0] for member in classes]


@cache
def _model(kind: str) -> TrainedModel:
    config = TypeAdapter(ModelConfig).validate_python({"kind": kind, **SMALL[kind][0]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(config)
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                torch.nn.init.normal_(module.running_mean, 0.0, 0.2)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                if module.affine:
                    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                    torch.nn.init.normal_(module.bias, 0.0, 0.2)
    contract = InputContract(image_size=config.image_size, colour_order="bgr")
    return TrainedModel(backbone.eval(), contract, kind, "0" * 64)


@cache
def _plain(kind: str) -> bytes:
    return build_onnx(_model(kind), OnnxSettings()).SerializeToString()


def test_every_kind_has_a_small_network_here() -> None:
    assert set(_kinds()) <= set(SMALL), "add the new kind to SMALL"


@pytest.mark.slow
@pytest.mark.parametrize("kind", _kinds())
@pytest.mark.parametrize(
    "settings",
    [
        OnnxSettings(),
        OnnxSettings(precision="fp16"),
        OnnxSettings(precision="bf16"),
        OnnxSettings(precision="int8"),
        OnnxSettings(precision="int8", quantisation="tensorrt"),
    ],
    ids=["fp32", "fp16", "bf16", "int8", "int8_for_tensorrt"],
)
def test_every_backbone_in_every_precision(tmp_path: Path, kind: str, settings: OnnxSettings) -> None:
    model = _model(kind)
    faces = synthetic_faces(model.contract.image_size)
    proto = finish_onnx(onnx.load_from_string(_plain(kind)), model, settings, faces)
    assert not [node.name for node in proto.graph.node if node.op_type == "BatchNormalization"]
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    report = check_parity(TorchEmbedder(model, device="cpu"), open_for_gates(path, settings.precision), faces)
    if settings.precision == "int8":
        assert report.min_cosine > SMALL[kind][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", _kinds())
def test_every_backbone_at_the_newest_opset(tmp_path: Path, kind: str) -> None:
    model = _model(kind)
    settings = OnnxSettings(opset_version=MAX_OPSET_VERSION)
    proto = finish_onnx(build_onnx(model, settings), model, settings)
    assert proto.opset_import[0].version == MAX_OPSET_VERSION
    assert ("Attention" in {node.op_type for node in proto.graph.node}) == (kind == "vit")
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    reference, faces = TorchEmbedder(model, device="cpu"), synthetic_faces(model.contract.image_size)
    for embedder in (OnnxEmbedder(path, threads=1), OpenVinoEmbedder(path, precision="fp32", threads=1)):
        assert check_parity(reference, embedder, faces).min_cosine > 0.9999
