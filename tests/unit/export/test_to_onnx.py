from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import export.to_onnx
from aroface.errors import ExportError, ShapeError
from aroface.inference import TorchEmbedder, TrainedModel
from export.metadata import ModelMetadata, Precision
from export.parity import synthetic_faces
from export.runtime import OnnxEmbedder
from export.to_onnx import OPSET_VERSION, OnnxSettings, build_onnx, export_onnx, finish_onnx, make_onnx, open_for_gates
from tests.helpers.checkpoints import IMAGE_SIZE, tiny_model

FACES = synthetic_faces(IMAGE_SIZE)


@cache
def _built(order: str, settings: OnnxSettings) -> bytes:
    """One tracing per variant for the whole file: it takes seconds."""
    return build_onnx(tiny_model(order), settings).SerializeToString(deterministic=True)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `export_onnx` reuse the graphs of this file."""

    def build(model: TrainedModel, settings: OnnxSettings) -> onnx.ModelProto:
        plain = replace(settings, precision="fp32", quantisation="cpu")
        return onnx.load_from_string(_built(model.contract.colour_order, plain))

    monkeypatch.setattr(export.to_onnx, "build_onnx", build)


@pytest.mark.parametrize(
    ("order", "settings"),
    [
        ("rgb", OnnxSettings()),
        ("bgr", OnnxSettings()),
        ("bgr", OnnxSettings(input_layout="float_nchw")),
        ("rgb", OnnxSettings(flip_fusion=True)),
    ],
)
def test_the_file_equals_the_checkpoint(tmp_path: Path, traced_once: None, order: str, settings: OnnxSettings) -> None:
    path = tmp_path / "model.onnx"
    model = tiny_model(order)
    done = export_onnx(model, path, FACES, settings)
    assert done.parity.batch_sizes == (1, 3, 8, 64)
    assert done.parity.min_cosine > 0.99999
    assert done.accuracy is None

    reference, exported = TorchEmbedder(model), OnnxEmbedder(path, threads=1)
    assert exported.contract == model.contract
    for size in (1, 3, 8):
        expected = reference.embed(FACES[:size])
        if settings.flip_fusion:
            expected = expected + reference.embed(np.ascontiguousarray(FACES[:size, :, ::-1]))
        embeddings, norms = exported.embed_with_norm(FACES[:size])
        np.testing.assert_allclose(embeddings, expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(norms, np.linalg.norm(embeddings, axis=1), rtol=1e-5)


def test_the_same_model_gives_the_same_bytes() -> None:
    again = build_onnx(tiny_model("rgb"), OnnxSettings()).SerializeToString(deterministic=True)
    assert again == _built("rgb", OnnxSettings())


def test_no_batch_norm_is_left_and_every_weight_is_constant() -> None:
    proto = onnx.load_from_string(_built("rgb", OnnxSettings()))
    operators = {node.op_type for node in proto.graph.node}
    assert "BatchNormalization" not in operators
    assert not operators & {"Constant", "Identity", "Dropout", "Shape"}
    assert proto.opset_import[0].version == OPSET_VERSION


@pytest.mark.parametrize("opset", [19, 29])
def test_opsets_that_cannot_be_had_are_refused(opset: int) -> None:
    with pytest.raises(ExportError, match="20 to 28 can"):
        make_onnx(tiny_model(), OnnxSettings(opset_version=opset))
    with pytest.raises(ExportError, match="22 to 28 can"):
        make_onnx(tiny_model(), OnnxSettings(opset_version=21, precision="bf16"))
    with pytest.raises(ExportError, match="20 to 27 can"):
        make_onnx(tiny_model(), OnnxSettings(opset_version=28, precision="int8"), FACES)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("opset", "precision"),
    [
        (28, "fp32"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in ((20, "fp32"), (24, "fp32"), (26, "fp32"), (28, "fp16"), (27, "int8"))
        ),
    ],
)
def test_every_opset_holds_the_same_operators(tmp_path: Path, opset: int, precision: Precision) -> None:
    protos, found = [], []
    for version in (OPSET_VERSION, opset):
        plain = onnx.load_from_string(_built("rgb", OnnxSettings(opset_version=version)))
        proto = finish_onnx(plain, tiny_model("rgb"), OnnxSettings(precision=precision, opset_version=version), FACES)
        assert [entry.version for entry in proto.opset_import] == [version]
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        protos.append(proto)
        found.append(open_for_gates(path, precision).embed(FACES[:3]))
    nodes = [[(node.op_type, sorted(map(str, node.attribute))) for node in proto.graph.node] for proto in protos]
    assert nodes[0] == nodes[1]
    np.testing.assert_array_equal(*found)


def test_the_file_is_self_contained_and_names_no_path_of_this_machine() -> None:
    proto = onnx.load_from_string(_built("rgb", OnnxSettings()))
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)
    assert b".py" not in _built("rgb", OnnxSettings())
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [output.name for output in proto.graph.output] == ["embedding", "norm"]


def test_a_graph_with_other_weights_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load_from_string(_built("rgb", OnnxSettings()))
    weight = max(proto.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, values.std(), values.shape).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(values + noise, weight.name))
    monkeypatch.setattr(export.to_onnx, "build_onnx", lambda model, settings: proto)
    with pytest.raises(ExportError, match="does not equal its checkpoint"):
        export_onnx(tiny_model(), tmp_path / "model.onnx", FACES)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_the_other_colour_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.load_from_string(_built("bgr", OnnxSettings()))
    monkeypatch.setattr(export.to_onnx, "build_onnx", lambda model, settings: proto)
    with pytest.raises(ExportError, match="No file was written"):
        export_onnx(tiny_model("rgb"), tmp_path / "model.onnx", FACES)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")
    proto = onnx.load_from_string(_built("bgr", OnnxSettings()))
    monkeypatch.setattr(export.to_onnx, "build_onnx", lambda model, settings: proto)
    with pytest.raises(ExportError):
        export_onnx(tiny_model("rgb"), path, FACES)
    assert path.read_bytes() == b"older"


def test_a_diverged_checkpoint_is_refused(tmp_path: Path, traced_once: None) -> None:
    model = tiny_model()
    model.backbone.fc.weight.data.fill_(float("nan"))
    with pytest.raises(ExportError, match="diverged"):
        export_onnx(model, tmp_path / "model.onnx", FACES)


def test_the_runtime_refuses_other_image_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_built("rgb", OnnxSettings()))
    with pytest.raises(ShapeError, match="resize faces"):
        OnnxEmbedder(path, threads=1).embed(np.zeros((1, 16, 16, 3), np.uint8))


def test_the_runtime_refuses_a_model_without_a_contract(tmp_path: Path) -> None:
    proto = onnx.load_from_string(_built("rgb", OnnxSettings()))
    del proto.metadata_props[:]
    path = tmp_path / "elsewhere.onnx"
    onnx.save(proto, path)
    with pytest.raises(ExportError, match=r"lacks aroface\.format_version.*aroface export"):
        OnnxEmbedder(path)


def test_the_runtime_refuses_what_is_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match="cannot be loaded"):
        OnnxEmbedder(path)
    with pytest.raises(ExportError, match="does not exist"):
        OnnxEmbedder(tmp_path / "missing.onnx")


def test_metadata_survive_the_way_through_text() -> None:
    proto = onnx.load_from_string(_built("rgb", OnnxSettings(flip_fusion=True)))
    props = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = ModelMetadata.from_props(props, name="model")
    assert metadata.contract == tiny_model("rgb").contract
    assert metadata.flip_fusion
    assert ModelMetadata.from_props(metadata.to_props(), name="again") == metadata


def test_metadata_of_a_newer_format_are_refused() -> None:
    proto = onnx.load_from_string(_built("rgb", OnnxSettings()))
    props = {entry.key: entry.value for entry in proto.metadata_props} | {"aroface.format_version": "99"}
    with pytest.raises(ExportError, match="Export the checkpoint again"):
        ModelMetadata.from_props(props, name="model")
