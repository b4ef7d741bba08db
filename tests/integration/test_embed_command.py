import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.images import encode_jpeg, resize_face
from aroface.inference import load_embedder, load_model
from export.parity import synthetic_faces
from export.to_onnx import export_onnx
from launch.cli import main
from retrieval.embedding_files import read_embeddings
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
        ("model.onnx", ("--precision", "bf16"), "is for checkpoints, and for .onnx files with --runtime openvino"),
        ("run", ("--processes", "2"), "needs a folder for --out"),
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


@pytest.mark.parametrize("options", [(), ("--processes", "2")])
def test_a_folder_of_parts_equals_the_file(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    whole = _embed(place, tmp_path / "all.npz", "run", "--flip", "sum")
    arguments = ["embed", str(place / "run"), str(place / "faces"), "--out", str(tmp_path / "parts"), "--flip", "sum"]
    arguments += ["--threads", "1", "--images-per-part", "4", *options]
    assert main(arguments) == 0
    said = capfd.readouterr()
    assert "6 images, D = 16, 1 not enrolled" in said.out
    assert "Embed: 6 of 6 images" in said.err
    parts = read_embeddings(tmp_path / "parts")
    np.testing.assert_allclose(parts.embeddings, whole["embeddings"], rtol=1e-5, atol=1e-5)
    for column in ("keys", "subject_ids", "fte"):
        np.testing.assert_array_equal(getattr(parts, column), whole[column])
    assert main(arguments) == 0
    assert main([*arguments, "--take", "first"]) == 2
    assert "holds another extraction" in capfd.readouterr().err


@pytest.mark.parametrize("layout", ["faces", "flat", "faces.zip", "list.csv", "shards"])
def test_parts_of_images_that_were_replaced_are_not_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    def write(seed: int) -> Path:
        root = tmp_path / str(seed)
        keys = [f"{'ab'[number % 2]}/{number}.jpg" for number in range(4)]
        for key, face in zip(keys, synthetic_faces(40, seed=seed), strict=False):
            path = root / ("flat" if layout == "flat" else "faces") / key.replace("/", "_" if layout == "flat" else "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_jpeg(face))
        if layout == "faces.zip":
            shutil.make_archive(str(root / "faces"), "zip", root / "faces")
        (root / "list.csv").write_text("".join(f"faces/{key},{key[0]}\n" for key in keys))
        if layout == "shards":
            assert main(["pack", str(root / "faces"), str(root / "shards")]) == 0
        return root / layout

    first, copied, other = write(7), tmp_path / "copied", write(8)
    shutil.copytree(first.parent, copied)
    for path in copied.rglob("*"):
        os.utime(path, (1, 1))  # another machine's times
    embed = ["embed", str(place / "run"), "--threads", "1", "--out", str(tmp_path / "parts")]
    assert main([*embed, str(first)]) == 0
    assert main([*embed, str(copied / layout)]) == 0
    capsys.readouterr()
    assert main([*embed, str(other)]) == 2
    assert "were replaced since. Remove that folder to embed all of them anew" in capsys.readouterr().err


def test_parts_of_faces_with_other_landmarks_are_not_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = np.asarray(ARCFACE_TEMPLATE_112).ravel()
    embed = ["embed", str(place / "run"), str(place / "faces"), "--threads", "1", "--out", str(tmp_path / "parts")]
    embed += ["--landmarks", str(tmp_path / "points.csv")]
    for shift, code in ((0, 0), (0, 0), (1, 2)):
        lines = (f"person{n % 2}/{n}.jpg," + ",".join(f"{value:.2f}" for value in points + shift) for n in range(6))
        (tmp_path / "points.csv").write_text("\n".join(lines))
        assert main(embed) == code
    assert "were replaced since" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["flat", "folders", "list"])
def test_a_link_to_nothing_is_an_unreadable_image_in_parts_too(place: Path, tmp_path: Path, layout: str) -> None:
    faces, folder = tmp_path / "faces", tmp_path / "faces" / ("a" if layout == "folders" else "")
    folder.mkdir(parents=True)
    for number, face in enumerate(synthetic_faces(40, seed=1)):
        (folder / f"{number}.jpg").write_bytes(encode_jpeg(face))
        if number == 1:
            break
    (folder / "2.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "list.csv").write_text("".join(f"faces/{number}.jpg,a\n" for number in range(3)))
    source = tmp_path / "list.csv" if layout == "list" else faces
    assert main(["embed", str(place / "run"), str(source), "--threads", "1", "--out", str(tmp_path / "parts")]) == 0
    assert read_embeddings(tmp_path / "parts").fte.tolist() == [False, False, True]


def test_an_image_that_was_not_asked_for_may_be_added(place: Path, tmp_path: Path) -> None:
    faces = shutil.copytree(place / "faces", tmp_path / "faces")
    embed = ["embed", str(place / "run"), str(faces), "--threads", "1", "--take", "first", "--out"]
    assert main([*embed, str(tmp_path / "parts")]) == 0
    last = sorted(faces.rglob("*.jpg"))[-1]
    shutil.copy(last, last.with_name("zz.jpg"))
    assert main([*embed, str(tmp_path / "parts")]) == 0


def test_every_process_gets_a_gpu_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cmd_embed import _device, _devices

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [_device(_devices(), number) for number in range(4)] == [{"CUDA_VISIBLE_DEVICES": n} for n in "0120"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert [_device(_devices(), number)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["5", "GPU-ab", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert _device(_devices(), 0) == {}


def test_a_mistake_in_one_process_ends_all_with_its_message(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["embed", str(place / "nowhere"), str(place / "faces"), "--out", str(tmp_path / "parts")]
    assert main([*command, "--processes", "2", "--threads", "1"]) == 2
    assert "give a run directory" in capfd.readouterr().err


def test_shards_have_a_part_each_and_an_evaluation_reads_the_folder(place: Path, tmp_path: Path) -> None:
    (tmp_path / "faces" / "a").mkdir(parents=True)
    for number, face in enumerate(synthetic_faces(40, seed=7)[:6]):
        path = tmp_path / "faces" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_jpeg(face))
    assert main(["pack", str(tmp_path / "faces"), str(tmp_path / "shards"), "--samples-per-shard", "4"]) == 0
    embed = ["embed", str(place / "run"), "--threads", "1"]
    assert main([*embed, str(tmp_path / "shards"), "--out", str(tmp_path / "parts")]) == 0
    assert main([*embed, str(tmp_path / "faces"), "--out", str(tmp_path / "all.npz")]) == 0
    assert sorted(path.name for path in (tmp_path / "parts" / "parts").iterdir()) == [
        "part-00000.npz",
        "part-00001.npz",
    ]
    assert "aligned_by" not in read_embeddings(tmp_path / "all.npz").metadata
    points = ",".join(f"{value:.2f}" for value in np.asarray(ARCFACE_TEMPLATE_112).ravel())
    listed = "".join(f"{'ab'[number % 2]}/{number}.jpg,{points}\n" for number in range(6))
    (tmp_path / "points.csv").write_text(f"key,{','.join(f'p{i}' for i in range(10))}\n{listed}")
    pack = ["pack", str(tmp_path / "faces"), "--align", "--landmarks", str(tmp_path / "points.csv")]
    assert main([*pack, str(tmp_path / "aligned")]) == 0
    assert main([*embed, str(tmp_path / "aligned"), "--out", str(tmp_path / "aligned.npz")]) == 0
    assert read_embeddings(tmp_path / "aligned.npz").metadata["aligned_by"] == "given landmarks, when packed"
    again = [str(tmp_path / "aligned"), "--landmarks", str(tmp_path / "points.csv")]
    assert main([*embed, *again, "--out", str(tmp_path / "again")]) == 0
    by_both = "given landmarks, when packed; points.csv"
    assert read_embeddings(tmp_path / "again").metadata["aligned_by"] == by_both
    results = []
    for name in ("parts", "all.npz"):
        out = tmp_path / f"{name}.json"
        command = ["evaluate", "identification", "--gallery", str(tmp_path / name), "--probes", str(tmp_path / name)]
        assert main([*command, "--out", str(out)]) == 0
        results.append(json.loads(out.read_text())["metrics"]["rank_1"]["value"])
    assert results[0] == results[1]


def test_align_is_refused_where_there_is_no_list(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat").mkdir()
    for number, face in enumerate(synthetic_faces(40, seed=7)[:2]):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(encode_jpeg(face))
    assert main(["pack", str(place / "faces"), str(tmp_path / "shards"), "--max-bad", "1"]) == 0
    for images, said in (("shards", "aligned when they were packed"), ("flat", "is a plain folder of images")):
        for out in ("out.npz", "parts"):
            command = ["embed", str(place / "run"), str(tmp_path / images), "--align", "--out", str(tmp_path / out)]
            capsys.readouterr()
            assert main(command) == 2
            error = capsys.readouterr().err
            assert said in error
            assert "Leave --align out" in error
            assert "--landmarks FILE" in error
            assert not (tmp_path / out).exists()


def test_a_flat_folder_is_aligned_by_the_landmarks_of_ijb(place: Path, tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    faces = synthetic_faces(112, seed=9)[:2]
    lines = []
    template = np.asarray(ARCFACE_TEMPLATE_112)  # a face there is aligned by a shift alone
    for number, face in enumerate(faces):
        canvas = np.zeros((140, 140, 3), np.uint8)
        canvas[20:132, 10:122] = face
        assert cv2.imwrite(str(tmp_path / "crops" / f"{number}.png"), canvas[..., ::-1])
        points = " ".join(f"{x + 10:.4f} {y + 20:.4f}" for x, y in template)
        lines.append(f"{number}.png {points} 0.99\n")
    (tmp_path / "points.txt").write_text("".join(lines))
    command = ["embed", str(place / "run"), str(tmp_path / "crops"), "--out", str(tmp_path / "e.npz")]
    assert main([*command, "--landmarks", str(tmp_path / "points.txt")]) == 0
    found = read_embeddings(tmp_path / "e.npz")
    expected = load_embedder(place / "run").embed(np.stack([resize_face(face, IMAGE_SIZE) for face in faces]))
    np.testing.assert_allclose(found.embeddings, expected, rtol=1e-3, atol=1e-3)
    assert found.metadata["aligned_by"] == "points.txt"
    (tmp_path / "points.txt").write_text(lines[0])
    assert main([*command, "--landmarks", str(tmp_path / "points.txt")]) == 2
