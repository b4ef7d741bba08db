"""fp16, bf16 and int8: what they keep, what they change, and who runs them."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import export.to_onnx
from aroface.errors import ExportError
from aroface.inference import TorchEmbedder
from aroface.types import Embedder
from export.accuracy import AccuracyGate, AccuracyLimits, check_accuracy
from export.half_precision import neck_nodes, to_half_precision
from export.metadata import ModelMetadata
from export.onnx_file import read_onnx
from export.openvino_runtime import OpenVinoEmbedder
from export.parity import check_parity, synthetic_faces
from export.quantise import MIN_CALIBRATION_FACES
from export.runtime import OnnxEmbedder
from export.to_onnx import OnnxSettings, build_onnx, export_onnx, finish_onnx
from tests.helpers.checkpoints import IMAGE_SIZE, tiny_model

FACES = synthetic_faces(IMAGE_SIZE)
FP16, BF16 = OnnxSettings(precision="fp16"), OnnxSettings(precision="bf16")
CPU_INT8 = OnnxSettings(precision="int8")
GPU_INT8 = OnnxSettings(precision="int8", quantisation="tensorrt")


@cache
def _plain() -> bytes:
    return build_onnx(tiny_model(), OnnxSettings()).SerializeToString()


@cache
def _made(settings: OnnxSettings) -> bytes:
    proto = finish_onnx(onnx.load_from_string(_plain()), tiny_model(), settings, FACES)
    return proto.SerializeToString(deterministic=True)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.to_onnx, "build_onnx", lambda model, settings: onnx.load_from_string(_plain()))


def write(path: Path, settings: OnnxSettings) -> Path:
    path.write_bytes(_made(settings))
    return path


def reference() -> TorchEmbedder:
    return TorchEmbedder(tiny_model(), device="cpu")


@pytest.mark.parametrize("settings", [FP16, BF16])
def test_the_body_is_half_and_the_neck_is_not(settings: OnnxSettings) -> None:
    proto = onnx.load_from_string(_made(settings))
    half = TensorProto.FLOAT16 if settings.precision == "fp16" else TensorProto.BFLOAT16
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    neck = [node for node in proto.graph.node if node.op_type in ("Gemm", "ReduceL2")]
    assert len(neck) == 2
    for node in proto.graph.node:
        floats = {types[name] for name in node.input if types.get(name) in (half, TensorProto.FLOAT)}
        assert floats <= ({TensorProto.FLOAT} if node in neck else {half}), node.name
    assert {value.type.tensor_type.elem_type for value in proto.graph.output} == {TensorProto.FLOAT}
    assert len(_made(settings)) < 0.7 * len(_plain())


def test_half_weights_are_the_weights_rounded_once() -> None:
    plain = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(_plain()).graph.initializer}
    rounded = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(_made(FP16)).graph.initializer}
    compared = 0
    for name, values in plain.items():
        if f"{name}_float16" in rounded:
            compared += 1
            np.testing.assert_array_equal(rounded[f"{name}_float16"], values.astype(np.float16))
    assert compared > 20


def test_a_graph_that_ends_in_half_precision_still_gives_fp32() -> None:
    proto = onnx.load_from_string(_plain())
    body = onnx.utils.Extractor(proto).extract_model(["images"], [neck_nodes(proto)[0].input[0]])
    half = to_half_precision(body, "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert half.graph.node[-1].op_type == "Cast"
    assert [value.name for value in half.graph.output] == [value.name for value in body.graph.output]


def test_fp16_on_onnx_runtime(tmp_path: Path) -> None:
    exported = OnnxEmbedder(write(tmp_path / "m.onnx", FP16), threads=1)
    report = check_parity(reference(), exported, FACES)
    assert report.cosine_limit == 0.999
    assert report.min_cosine > 0.9999
    assert exported.model_id.endswith("-onnx-fp16")


def test_bf16_runs_on_openvino_and_the_other_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", BF16)
    check_parity(reference(), OpenVinoEmbedder(path, precision="bf16", threads=1), FACES)
    with pytest.raises(ExportError, match="--runtime openvino"):
        OnnxEmbedder(path)


def test_openvino_runs_the_file_of_onnx_runtime(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_plain())
    exact = OpenVinoEmbedder(path, threads=1)
    assert check_parity(reference(), exact, FACES).min_cosine > 0.99999
    assert exact.model_id != OnnxEmbedder(path, threads=1).model_id
    first = exact.embed(FACES[:2])
    kept = first.copy()
    exact.embed(FACES[2:4])
    np.testing.assert_array_equal(first, kept)  # the runtime's buffers are not handed out


@pytest.mark.parametrize("settings", [CPU_INT8, GPU_INT8])
def test_int8_is_close_on_every_runtime(tmp_path: Path, settings: OnnxSettings) -> None:
    path = write(tmp_path / "m.onnx", settings)
    for exported in (OnnxEmbedder(path, threads=1), OpenVinoEmbedder(path, threads=1)):
        report = check_parity(reference(), exported, FACES)
        assert 0.98 < report.min_cosine < 0.999999


@pytest.mark.parametrize(("settings", "zero_point"), [(CPU_INT8, np.uint8), (GPU_INT8, np.int8)])
def test_where_the_scales_stand(settings: OnnxSettings, zero_point: type) -> None:
    proto = onnx.load_from_string(_made(settings))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    readers = {name: node for node in proto.graph.node for name in node.input}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == zero_point
            if settings is GPU_INT8:
                assert constants[node.input[2]] == 0
        if node.op_type == "Conv":
            assert makers[node.input[0]].op_type == makers[node.input[1]].op_type == "DequantizeLinear"
            is_scaled_behind = readers[node.output[0]].op_type == "QuantizeLinear"
            assert is_scaled_behind == (settings is CPU_INT8)
        if node.op_type == "Gemm":
            assert node.input[1] in constants  # the neck stays as it is
    metadata = ModelMetadata.from_props({entry.key: entry.value for entry in proto.metadata_props}, name="m")
    assert (metadata.precision, metadata.quantisation) == ("int8", settings.quantisation)


def test_int8_wants_enough_faces() -> None:
    with pytest.raises(ExportError, match=f"at least {MIN_CALIBRATION_FACES} are needed"):
        finish_onnx(onnx.load_from_string(_plain()), tiny_model(), CPU_INT8, FACES[:31])


def test_int8_wants_a_gate_and_the_gate_decides(tmp_path: Path, traced_once: None) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="--accuracy-set"):
        export_onnx(tiny_model(), path, FACES, CPU_INT8, calibration=FACES)

    def export_with(after: float) -> object:
        def measure(embedder: Embedder) -> dict[str, float]:
            return {"rank_1": 0.9, "tar@far=0.001": 0.8 if isinstance(embedder, TorchEmbedder) else after}

        gate = AccuracyGate(measure, "a set", AccuracyLimits(tar=0.02))
        return export_onnx(tiny_model(), path, FACES, CPU_INT8, calibration=FACES, gate=gate).accuracy

    with pytest.raises(ExportError, match=r"a set: tar@far=0\.001 0\.8000 -> 0\.7700 \(may fall by 0\.02\).*No file"):
        export_with(0.77)
    assert list(tmp_path.iterdir()) == []
    report = export_with(0.785)
    assert [entry.name for entry in report.changes] == ["rank_1", "tar@far=0.001"]  # type: ignore[attr-defined]
    assert path.is_file()


def test_a_rate_that_is_not_a_number_fails_and_a_gain_does_not() -> None:
    values = iter([{"tpir@fpir=0.01": 0.5}, {"tpir@fpir=0.01": float("nan")}])
    with pytest.raises(ExportError, match="tpir"):
        check_accuracy(reference(), reference(), AccuracyGate(lambda embedder: next(values), "s"))
    values = iter([{"rank_1": 0.5, "tar@far=0.1": 0.005}, {"rank_1": 0.9, "tar@far=0.1": 0.0}])
    report = check_accuracy(reference(), reference(), AccuracyGate(lambda embedder: next(values), "s"))
    rank, tar = report.to_json()["metrics"]
    assert rank["change"] == pytest.approx(0.4)
    assert rank["can_tell"]
    assert not tar["can_tell"]  # 0.5 % cannot fall by more than 1 %


def test_a_set_on_which_no_rate_can_fall_is_refused() -> None:
    values = iter([{"rank_1": 0.01, "tar@far=0.1": 0.0}, {"rank_1": 0.01, "tar@far=0.1": 0.0}])
    rates = {"rank_1": 0.01, "tar@far=0.1": 0.0}
    waived = AccuracyGate(lambda embedder: rates, "s", AccuracyLimits(rank_1=1, tar=1))
    assert check_accuracy(reference(), reference(), waived).changes
    with pytest.raises(ExportError, match="cannot tell"):  # one limit waives its rate alone
        check_accuracy(reference(), reference(), AccuracyGate(lambda embedder: rates, "s", AccuracyLimits(rank_1=1)))
    with pytest.raises(ExportError, match=r"s cannot tell .*rank_1 0\.0100, tar@far=0\.1 0\.0000.*--accuracy-set"):
        check_accuracy(reference(), reference(), AccuracyGate(lambda embedder: next(values), "s"))


def test_other_scales_are_another_model(tmp_path: Path, traced_once: None) -> None:
    def measure(embedder: Embedder) -> dict[str, float]:
        return {"rank_1": 0.9}

    ids = []
    for number, faces in enumerate((FACES, FACES, FACES // 2)):
        path = tmp_path / f"{number}.onnx"
        gate = AccuracyGate(measure, "a set")
        export_onnx(tiny_model(), path, FACES, CPU_INT8, calibration=faces, gate=gate)
        ids.append(OnnxEmbedder(path).model_id)
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].rpartition("-")[0] == ids[2].rpartition("-")[0]
    assert ids[0].rpartition("-")[0].endswith("-onnx-int8")


def test_damaged_files_are_refused_by_both_readers(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    for open_file in (OpenVinoEmbedder, read_onnx):
        with pytest.raises(ExportError, match="is not an ONNX file"):
            open_file(path)
        with pytest.raises(ExportError, match="does not exist"):
            open_file(tmp_path / "missing.onnx")
    path.write_bytes(_plain()[: len(_plain()) // 2])
    for open_file in (OpenVinoEmbedder, OnnxEmbedder):
        with pytest.raises(ExportError):
            open_file(path)
