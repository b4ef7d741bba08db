import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from tests.helpers.checkpoints import write_checkpoint


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
        (["missing", "--out", "m.onnx"], "is not a directory; give a run directory"),
        (["run", "--out", "m.onnx", "--precision", "int8"], "name some with --calibration"),
        (["run", "--out", "m.onnx", "--precision", "int8", "--faces", "faces"], "--accuracy-set"),
        (["run", "--out", "m.onnx", "--opset", "7"], "20 to 25 can"),
        (["run", "--out", "m.onnx", "--far", "0"], "is not a rate"),
        (["run", "--out", "m.onnx", "--max-tar-drop", "-1"], "is not a difference of rates"),
        (["m.onnx", "--out", "n.onnx"], "is an ONNX file already"),
        (["run", "--out", "m.engine", "--to", "tensorrt", "--batch-profile", "8,4,2"], "such as 1,32,64"),
        (["run", "--out", "."], "name a file in it"),
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
