import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import export.tensorrt_probe
import export.tensorrt_runtime
import export.to_tensorrt
from export.tensorrt_probe import GpuState
from launch.cli import main
from shards.synthetic import write_synthetic
from tests.helpers import tensorrt_stand_in
from tests.helpers.checkpoints import write_checkpoint

GATE = ["--far", "0.05", "--fpir", "0.1", "--max-rank1-drop", "1", "--max-tar-drop", "1", "--max-tpir-drop", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a folder of 24 drawn identities with 4 images each."""
    root = tmp_path_factory.mktemp("export")
    write_checkpoint(root / "run", "bgr")
    write_synthetic(root / "faces", identities=24, images_per_identity=4, seed=0)
    return root


def embed(model: Path, faces: Path, out: Path, *options: str) -> np.ndarray:
    assert main(["embed", str(model), str(faces), "--out", str(out), "--threads", "1", *options]) == 0
    with np.load(out) as file:
        return file["embeddings"]


def test_int8_is_calibrated_gated_reported_and_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, faces = tmp_path / "int8.onnx", str(place / "faces")
    command = ["export", str(place / "run"), "--out", str(out), "--precision", "int8", "--calibration", faces]
    command += ["--accuracy-set", faces, *GATE]
    assert main([*command, "--calibration-faces", "40"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.with_name("int8.onnx.json").read_text())
    assert report["calibration"] == {"set": faces, "faces": 40}
    assert report["quantisation"] == "cpu"
    assert [entry["name"] for entry in report["accuracy"]["metrics"]] == ["rank_1", "tar@far=0.05", "tpir@fpir=0.1"]
    for entry in report["accuracy"]["metrics"]:
        assert entry["name"] in printed
        assert entry["checkpoint"] - entry["exported"] <= entry["allowed_fall"]
    plain = embed(place / "run", place / "faces", tmp_path / "torch.npz")
    for runtime in ("onnxruntime", "openvino"):
        values = embed(out, place / "faces", tmp_path / f"{runtime}.npz", "--runtime", runtime)
        cosines = (values * plain).sum(1) / np.linalg.norm(values, axis=1) / np.linalg.norm(plain, axis=1)
        assert 0.97 < cosines.min() < 0.999999
    out.unlink()
    assert main([*command, "--calibration-faces", "31"]) == 2
    assert "at least 32 are needed" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_gate_of_another_precision_is_reported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, faces = tmp_path / "fp16.onnx", str(place / "faces")
    command = ["export", str(place / "run"), "--out", str(out), "--precision", "fp16", "--accuracy-set", faces]
    assert main([*command, *GATE]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.with_name("fp16.onnx.json").read_text())
    assert (report["precision"], report["calibration"], report["quantisation"]) == ("fp16", None, None)
    assert report["parity"]["cosine_limit"] == 0.999
    assert report["accuracy"]["set"] == faces
    names = ["rank_1", "tar@far=0.05", "tpir@fpir=0.1"]
    assert [entry["name"] for entry in report["accuracy"]["metrics"]] == names
    assert all(name in printed for name in names)
    assert all(abs(entry["checkpoint"] - entry["exported"]) <= 0.5 for entry in report["accuracy"]["metrics"])
    assert main([*command, *GATE, "--fpir", "0.0001"]) == 0  # waived: none of so few strangers may raise an alarm
    report = json.loads(out.with_name("fp16.onnx.json").read_text())
    assert [entry["name"] for entry in report["accuracy"]["metrics"]] == names[:2]


@pytest.mark.slow
def test_int8_is_calibrated_on_shards(place: Path, tmp_path: Path) -> None:
    shards, out = str(tmp_path / "shards"), tmp_path / "int8.onnx"
    assert main(["pack", str(place / "faces"), shards]) == 0
    command = ["export", str(place / "run"), "--out", str(out), "--precision", "int8", "--calibration", shards]
    assert main([*command, "--calibration-faces", "40", "--accuracy-set", shards, *GATE]) == 0
    report = json.loads(out.with_name("int8.onnx.json").read_text())
    assert report["calibration"] == {"set": shards, "faces": 40}
    assert report["accuracy"]["set"] == shards


def test_a_bf16_file_runs_on_openvino_only(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bf16.onnx"
    assert main(["export", str(place / "run"), "--out", str(out), "--precision", "bf16"]) == 0
    embed(out, place / "faces", tmp_path / "e.npz", "--runtime", "openvino", "--precision", "bf16")
    assert main(["embed", str(out), str(place / "faces"), "--out", str(tmp_path / "f.npz")]) == 2
    assert "--runtime openvino" in capsys.readouterr().err
    assert main(["embed", str(place / "run"), str(place / "faces"), "--out", "x.npz", "--runtime", "openvino"]) == 2
    assert "runs .onnx files" in capsys.readouterr().err


def test_an_engine_by_a_stand_in_for_tensorrt(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The whole way of the command: checkpoint or ONNX file, engine and record, and the engine as a model."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_stand_in)
    for module in (export.to_tensorrt, export.tensorrt_runtime):
        monkeypatch.setattr(module, "new_stream", tensorrt_stand_in.Stream)
    for module in (export.to_tensorrt, export.tensorrt_runtime, export.tensorrt_probe):
        monkeypatch.setattr(module, "require_tensorrt", lambda: GpuState("11.4.0.106", "Stand-in 1", "9.0", "13.0"))
    run, faces = str(place / "run"), str(place / "faces")
    onnx_file, engine, direct = tmp_path / "m.onnx", tmp_path / "m.engine", tmp_path / "direct.engine"
    assert main(["export", run, "--out", str(onnx_file), "--precision", "fp16"]) == 0
    profiles = ["--batch-profile", "1,1,4", "--batch-profile", "1,16,64"]
    assert main(["export", str(onnx_file), "--to", "tensorrt", "--out", str(engine), "--faces", faces, *profiles]) == 0
    printed = capsys.readouterr().out
    assert "TensorRT 11.4.0.106 for Stand-in 1" in printed
    assert "batches of 1,1,4 and 1,16,64" in printed
    assert "m.onnx has opset 25, and TensorRT 11.4 is known to read 24 at most" in caplog.text
    caplog.clear()
    record = json.loads(engine.with_name("m.engine.json").read_text())
    assert record["parity"]["min_cosine"] > 0.9999
    assert record["engine"]["model"]["precision"] == "fp16"
    assert main(["export", run, "--to", "tensorrt", "--out", str(direct), "--precision", "fp16"]) == 0
    assert "opset" not in caplog.text
    plain = embed(place / "run", place / "faces", tmp_path / "torch.npz")
    for model in (engine, direct):
        np.testing.assert_allclose(embed(model, place / "faces", tmp_path / "e.npz"), plain, rtol=0.05, atol=0.5)
    bench = ["bench", "export", str(onnx_file), str(engine), "--batches", "1,3", "--rounds", "1", "--images", "3"]
    assert main([*bench, "--out", str(tmp_path / "bench.json")]) == 0
    figures = {
        figure["name"]: figure["value"] for figure in json.loads((tmp_path / "bench.json").read_text())["figures"]
    }
    assert figures["batch 3: m.engine, smallest cosine"] > 0.9999
    capsys.readouterr()
    assert main(["export", str(onnx_file), "--to", "tensorrt", "--out", str(engine), "--precision", "fp32"]) == 2
    assert "keeps the precision of its ONNX file" in capsys.readouterr().err
    settled = ["--opset", "24", "--flip-fusion", "--input", "float_nchw", "--int8-for", "tensorrt"]
    assert main(["export", str(onnx_file), "--to", "tensorrt", "--out", str(engine), *settled]) == 2
    assert "--opset, --input, --flip-fusion, --int8-for: an engine keeps what stands in" in capsys.readouterr().err


def test_export_writes_the_model_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "run", "bgr")
    out = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(out)]) == 0
    assert "smallest cosine" in capsys.readouterr().out
    report = json.loads((tmp_path / "model.onnx.json").read_text())
    assert report["parity"]["min_cosine"] >= report["parity"]["cosine_limit"] == 0.9999
    assert report["contract"]["colour_order"] == "bgr"
    assert report["file_bytes"] == out.stat().st_size


def test_the_exporter_prints_nothing_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run")
    command = [sys.executable, "-m", "launch", "export", str(tmp_path / "run"), "--out", str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--out", "m.onnx"], "does not exist; give a run directory"),
        (["run", "--out", "m.onnx", "--precision", "int8"], "name some with --calibration"),
        (["run", "--out", "m.onnx", "--precision", "int8", "--faces", "faces"], "--accuracy-set"),
        (["run", "--out", "m.onnx", "--opset", "7"], "20 to 28 can"),
        (["run", "--out", "m.onnx", "--far", "0"], "is not a rate"),
        (["run", "--out", "m.onnx", "--max-tar-drop", "-1"], "is not a difference of rates"),
        (["m.onnx", "--out", "n.onnx"], "is an ONNX file already"),
        (["run", "--out", "m.engine", "--to", "tensorrt", "--batch-profile", "8,4,2"], "such as 1,32,64"),
        (["run", "--out", "m.onnx", "--batch-profile", "1,2,4", "--timing-cache", "c"], "--batch-profile, --timing-c"),
        (["run", "--out", "m.onnx", "--workspace-gib", "2"], "--workspace-gib: only TensorRT engines have that"),
        (["run", "--out", "m.onnx", "--optimisation-level", "0"], "Leave it out, or use --to tensorrt"),
        (["run", "--out", "m.onnx", "--faces", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "run")
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "m.onnx").exists()
