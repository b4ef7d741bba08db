"""Engines by a stand-in for TensorRT, and the stand-in by the names of the real bindings."""

import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import export.tensorrt_probe
import export.tensorrt_runtime
import export.to_tensorrt
from aroface.errors import ExportError
from aroface.files import read_json, write_json
from aroface.inference import TorchEmbedder
from export.accuracy import AccuracyGate
from export.engine_record import BatchProfile, read_engine_record, record_path
from export.parity import synthetic_faces
from export.tensorrt_probe import GpuState, require_tensorrt
from export.tensorrt_runtime import choose_profile, open_engine
from export.to_onnx import OPSET_VERSION, OnnxSettings, make_onnx
from export.to_tensorrt import EngineSettings, export_tensorrt, opset_for
from tests.helpers import tensorrt_stand_in as stand_in
from tests.helpers.checkpoints import IMAGE_SIZE, tiny_model

FACES = synthetic_faces(IMAGE_SIZE)
GPU = GpuState("11.4.0.106", "Stand-in 1", "9.0", "13.0")
RECORDED = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())


@cache
def _graph(precision: str) -> bytes:
    settings = OnnxSettings(precision=precision, quantisation="tensorrt")  # type: ignore[arg-type]
    return make_onnx(tiny_model("bgr"), settings, FACES).SerializeToString()


def graph(precision: str = "fp32") -> onnx.ModelProto:
    return onnx.load_from_string(_graph(precision))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT and a GPU, as far as our code can see."""
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    for module in (export.to_tensorrt, export.tensorrt_runtime):
        monkeypatch.setattr(module, "new_stream", stand_in.Stream)
        monkeypatch.setattr(module, "require_tensorrt", lambda: GPU)
    monkeypatch.setattr(stand_in.Builder, "seen", [])


def build(path: Path, settings: EngineSettings | None = None, precision: str = "fp32", **options: object):
    reference = TorchEmbedder(tiny_model("bgr"), device="cpu")
    return export_tensorrt(graph(precision), path, reference, FACES, settings, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_every_name_that_is_used_exists_in_the_bindings(version: str) -> None:
    """Our code runs on the stand-in, so it uses no other names; and these exist with these parameters."""
    recorded = RECORDED[version]
    assert set(stand_in.public_names()) == set(recorded), "run tests/helpers/record_tensorrt_names.py again"
    assert [name for name, overloads in recorded.items() if overloads is None] == []
    functions = 0
    for name in stand_in.public_names():
        kind, _, member = name.partition(".")
        own = vars(getattr(stand_in, kind)).get(member) if member else None
        if inspect.isfunction(own):
            functions += 1
            parameters = list(inspect.signature(own).parameters)[1:]
            assert any(parameters == overload[: len(parameters)] for overload in recorded[name]), name
    assert functions > 15


def test_the_record_spans_both_generations() -> None:
    assert {version.split(".")[0] for version in RECORDED} == {"10", "11"}
    assert min(tuple(map(int, version.split(".")[:2])) for version in RECORDED) == (10, 9)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_gives_the_embeddings_of_the_checkpoint(tmp_path: Path, tensorrt: None, precision: str) -> None:
    path = tmp_path / "model.engine"
    done = build(path, precision=precision)
    assert done.parity.batch_sizes == (1, 3, 8, 64)
    engine = open_engine(path, batch_size=5)
    assert engine.model_id.endswith(f"-tensorrt-{precision}")
    expected = TorchEmbedder(tiny_model("bgr"), device="cpu").embed(FACES[:12])
    embeddings, norms = engine.embed_with_norm(FACES[:12])
    tolerance = 1e-3 if precision == "fp32" else 3e-1
    np.testing.assert_allclose(embeddings, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(norms, np.linalg.norm(embeddings, axis=1), rtol=1e-5)
    record = read_engine_record(path)
    assert (record.device, record.tensorrt_version, record.model.precision) == ("Stand-in 1", "11.4.0.106", precision)


def test_the_builder_gets_the_settings(tmp_path: Path, tensorrt: None) -> None:
    profiles = (BatchProfile.parse("1,2,4"), BatchProfile.parse("4,64,64"))
    cache_file = tmp_path / "timing.cache"
    settings = EngineSettings(profiles, workspace_gib=0.5, timing_cache=cache_file, optimisation_level=5)
    build(tmp_path / "model.engine", settings)
    config = stand_in.Builder.seen[-1]
    sizes = (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert [profile.shapes["images"] for profile in config.profiles] == [
        [[1, *sizes], [2, *sizes], [4, *sizes]],
        [[4, *sizes], [64, *sizes], [64, *sizes]],
    ]
    assert config.flags == set()  # TF32 is off
    assert config.workspace == 1 << 29
    assert config.builder_optimization_level == 5
    assert cache_file.read_bytes() == stand_in.CACHE_HEADER
    build(tmp_path / "again.engine", settings)
    cache_file.write_bytes(b"of another device")
    with pytest.raises(ExportError, match="name another file or delete this one"):
        build(tmp_path / "third.engine", settings)
    assert not (tmp_path / "third.engine").exists()


def test_small_batches_are_padded_and_large_ones_split(tmp_path: Path, tensorrt: None) -> None:
    path = tmp_path / "model.engine"
    build(path, EngineSettings((BatchProfile.parse("4,6,6"),)))
    engine = open_engine(path)
    expected = TorchEmbedder(tiny_model("bgr"), device="cpu").embed(FACES[:13])
    for size in (1, 3, 4, 6, 7, 13):
        np.testing.assert_allclose(engine.embed(FACES[:size]), expected[:size], rtol=1e-3, atol=1e-3)


def test_the_nearest_profile_runs_a_batch() -> None:
    profiles = (BatchProfile.parse("1,1,8"), BatchProfile.parse("1,32,64"), BatchProfile.parse("16,16,16"))
    assert [choose_profile(profiles, batch) for batch in (1, 8, 9, 16, 17, 64)] == [0, 0, 1, 2, 1, 1]
    assert choose_profile((BatchProfile.parse("4,4,4"), BatchProfile.parse("8,8,8")), 2) == 0


def test_older_releases_get_an_older_opset() -> None:
    assert opset_for("11.5", "fp16") == opset_for("11.10", "fp32") == opset_for("12.0", "bf16") == OPSET_VERSION
    assert {opset_for(release, "bf16") for release in ("10.14", "10.16", "11.0", "11.4")} == {24}
    assert (opset_for("10.13", "int8"), opset_for("10.9", "bf16"), opset_for("10.0", "fp32")) == (20, 22, 20)


@pytest.mark.parametrize("text", ["", "1", "1,2", "0,1,2", "2,1,3", "1,2,x", "1,2,9999", "1,2,3,4"])
def test_profiles_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ExportError, match=r"such as 1,32,64"):
        BatchProfile.parse(text)


def test_what_tensorrt_reports_is_in_the_message(
    tmp_path: Path, tensorrt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in.Builder, "fails_with", "out of tactics")
    with pytest.raises(ExportError, match=r"built no engine: out of tactics\. .*--workspace-gib"):
        build(tmp_path / "model.engine")
    broken = graph()
    broken.graph.node[3].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"cannot read the graph: .*NoSuchOperator.*--opset"):
        export_tensorrt(broken, tmp_path / "model.engine", TorchEmbedder(tiny_model("bgr"), device="cpu"), FACES)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_other_weights_is_refused_and_leaves_no_file(tmp_path: Path, tensorrt: None) -> None:
    other = TorchEmbedder(tiny_model("rgb"), device="cpu")
    with pytest.raises(ExportError, match="does not equal its checkpoint"):
        export_tensorrt(graph(), tmp_path / "model.engine", other, FACES)
    assert list(tmp_path.iterdir()) == []


def test_int8_needs_scales_for_tensorrt_and_a_gate(tmp_path: Path, tensorrt: None) -> None:
    proto = graph("int8")
    reference = TorchEmbedder(tiny_model("bgr"), device="cpu")
    with pytest.raises(ExportError, match="--accuracy-set"):
        export_tensorrt(proto, tmp_path / "model.engine", reference, FACES)
    rates = iter([{"rank_1": 0.90}, {"rank_1": 0.87}])
    gate = AccuracyGate(lambda embedder: next(rates), "a set")
    with pytest.raises(ExportError, match=r"rank_1 0\.9000 -> 0\.8700"):
        export_tensorrt(proto, tmp_path / "model.engine", reference, FACES, gate=gate)
    assert list(tmp_path.iterdir()) == []
    for entry in proto.metadata_props:
        if entry.key == "aroface.quantisation":
            entry.value = "cpu"
    with pytest.raises(ExportError, match="--int8-for tensorrt"):
        export_tensorrt(proto, tmp_path / "model.engine", reference, FACES, gate=gate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EngineSettings(optimisation_level=6), "0 .fast build. to 5"),
        (EngineSettings(workspace_gib=0.0), "give a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, tensorrt: None, settings: EngineSettings, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        build(tmp_path / "model.engine", settings)


def test_an_engine_is_refused_without_its_record_or_with_that_of_another(tmp_path: Path, tensorrt: None) -> None:
    path = tmp_path / "model.engine"
    with pytest.raises(ExportError, match="does not exist; make it with"):
        open_engine(path)
    build(path)
    record = read_json(record_path(path))
    flipped = bytearray(path.read_bytes())
    flipped[100] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ExportError, match="SHA-256 differs"):
        open_engine(path)
    flipped[100] ^= 1
    path.write_bytes(flipped)
    open_engine(path)
    write_json(record_path(path), {**record, "engine": {**record["engine"], "profiles": []}})
    with pytest.raises(ExportError, match="is damaged"):
        open_engine(path)
    write_json(record_path(path), {"parity": {}})
    with pytest.raises(ExportError, match="describes no engine"):
        open_engine(path)
    record_path(path).unlink()
    with pytest.raises(ExportError, match="Copy it along with the engine"):
        open_engine(path)


@pytest.mark.parametrize(
    "other",
    [GpuState("11.3.0.99", "Stand-in 1", "9.0", "13.0"), GpuState("11.4.0.106", "Stand-in 2", "8.9", "13.0")],
)
def test_an_engine_of_another_machine_is_refused(
    tmp_path: Path, tensorrt: None, monkeypatch: pytest.MonkeyPatch, other: GpuState
) -> None:
    build(tmp_path / "model.engine")
    monkeypatch.setattr(export.tensorrt_runtime, "require_tensorrt", lambda: other)
    with pytest.raises(ExportError, match="Build it again here"):
        open_engine(tmp_path / "model.engine")


def test_a_plan_that_tensorrt_does_not_load(tmp_path: Path, tensorrt: None) -> None:
    done = build(tmp_path / "model.engine")
    with pytest.raises(ExportError, match="magic tag does not match"):
        export.tensorrt_runtime.TensorRtEmbedder(b"nothing", done.record, name="model.engine")


@pytest.mark.parametrize(
    ("done", "message"),
    [
        (subprocess.CompletedProcess([], -11, "", "Segmentation fault"), "does not start .exit code -11"),
        (subprocess.CompletedProcess([], 1, "", "x\nImportError: libnvinfer.so.11"), "libnvinfer.so.11"),
        (subprocess.CompletedProcess([], 0, '{"cuda": false}\n', ""), "There is no NVIDIA GPU here"),
        (
            subprocess.CompletedProcess(
                [],
                0,
                '{"cuda": true, "device": "T4", "compute_capability": "7.5", "cuda_version": "12.4", '
                '"tensorrt_version": "10.8.0"}',
                "",
            ),
            "too old; 10.9",
        ),
    ],
)
def test_the_probe_tells_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, done: "subprocess.CompletedProcess[str]", message: str
) -> None:
    monkeypatch.setattr(export.tensorrt_probe.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(export.tensorrt_probe, "_probe", lambda: done)
    with pytest.raises(ExportError, match=message):
        require_tensorrt()


def test_a_probe_that_finds_both(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cuda": True, "device": "H", "compute_capability": "9.0", "cuda_version": "13.0"}
    text = "a line that something else printed\n" + json.dumps({**found, "tensorrt_version": "10.13.3.9"})
    monkeypatch.setattr(export.tensorrt_probe.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(export.tensorrt_probe, "_probe", lambda: subprocess.CompletedProcess([], 0, text, ""))
    assert require_tensorrt() == GpuState("10.13.3.9", "H", "9.0", "13.0")
    assert require_tensorrt().tensorrt_release == "10.13"


def test_without_tensorrt_the_message_says_where_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.tensorrt_probe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install tensorrt.*--to tensorrt --out MODEL\.engine"):
        require_tensorrt()


def test_the_program_of_the_probe_uses_no_names_but_those_of_the_bindings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {2: SimpleNamespace(name="Stand-in 1", major=9, minor=0)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", names.__getitem__)
    monkeypatch.setattr(sys, "argv", ["-c", "2"])
    exec(export.tensorrt_probe._PROGRAM, {})  # noqa: S102 - the program itself
    state = json.loads(capsys.readouterr().out)
    assert state["tensorrt_version"] == stand_in.__version__
    assert (state["runtime"], state["compute_capability"]) == (True, "9.0")


def test_the_program_of_the_probe_runs_here() -> None:
    """Torch is asked before TensorRT is touched, so a machine without a GPU gets an answer and no crash."""
    done = export.tensorrt_probe._probe()
    assert done.returncode == 0, done.stderr
    assert "cuda" in json.loads(done.stdout)
