from pathlib import Path

import numpy as np
import pytest

from aroface.images import encode_jpeg
from aroface.inference import load_model
from export.parity import synthetic_faces
from export.to_onnx import export_onnx
from launch.cli import main
from retrieval.embeddings import read_embeddings
from tests.helpers.checkpoints import IMAGE_SIZE, write_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, and a folder of 2 identities with 3 images each, one of them broken."""
    root = tmp_path_factory.mktemp("embed")
    write_checkpoint(root / "run", "bgr")
    export_onnx(load_model(root / "run"), root / "model.onnx", synthetic_faces(IMAGE_SIZE))
    pixels = synthetic_faces(40, seed=5)
    for number, face in enumerate(pixels[:6]):
        path = root / "faces" / f"person{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(face))
    (root / "faces" / "person0" / "4.jpg").write_bytes(b"\xff\xd8\xff broken")
    return root


def _embed(place: Path, out: Path, model: str, *options: str) -> dict[str, np.ndarray]:
    arguments = ["embed", str(place / model), str(place / "faces"), "--out", str(out), "--threads", "1", *options]
    assert main(arguments) == 0
    with np.load(out, allow_pickle=False) as file:
        return dict(file)


def test_checkpoint_and_onnx_give_the_same_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_file = _embed(place, tmp_path / "torch.npz", "run")
    onnx_file = _embed(place, tmp_path / "onnx.npz", "model.onnx", "--batch", "2")
    assert "6 images of 2 identities" in capsys.readouterr().out
    np.testing.assert_allclose(torch_file["embeddings"], onnx_file["embeddings"], rtol=1e-3, atol=1e-3)
    assert torch_file["embeddings"].dtype == np.float32
    assert torch_file["keys"].tolist() == onnx_file["keys"].tolist()
    assert torch_file["subject_ids"].tolist() == ["person0"] * 3 + ["person1"] * 3
    assert torch_file["fte"].tolist() == [False, False, True, False, False, False]
    assert not torch_file["embeddings"][2].any()
    described = read_embeddings(tmp_path / "onnx.npz").metadata
    assert described["contract"]["colour_order"] == "bgr"
    assert described["model_id"].endswith("-onnx-fp32")


def test_first_and_rest_are_the_whole_set(place: Path, tmp_path: Path) -> None:
    whole = _embed(place, tmp_path / "all.npz", "run")
    first = _embed(place, tmp_path / "first.npz", "run", "--take", "first")
    rest = _embed(place, tmp_path / "rest.npz", "run", "--take", "rest")
    assert len(first["keys"]) == 2
    assert sorted([*first["keys"], *rest["keys"]]) == sorted(whole["keys"])


def test_flip_sum_on_onnx_equals_the_checkpoint(place: Path, tmp_path: Path) -> None:
    by_onnx = _embed(place, tmp_path / "onnx.npz", "model.onnx", "--flip", "sum")
    by_torch = _embed(place, tmp_path / "torch.npz", "run", "--flip", "sum")
    np.testing.assert_allclose(by_onnx["embeddings"], by_torch["embeddings"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere", (), "give a run directory"),
        ("nowhere.onnx", (), "does not exist; make it with"),
        ("faces", (), "holds no whole checkpoint"),
        ("faces/person1/1.jpg", (), "is not a model that can be run"),
        ("model.onnx", ("--precision", "bf16"), "is for checkpoints"),
        ("run", ("--batch", "0"), "--batch 0 is out of range"),
        ("run", ("--decode-threads", "-1"), "--decode-threads -1 is out of range"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, options: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out.npz"
    assert main(["embed", str(place / model), str(place / "faces"), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()
