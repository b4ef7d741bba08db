import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aroface.bf16 import has_bf16_units
from aroface.config.schema import ArcFaceConfig
from aroface.heads import build_head
from launch.bench import roofline
from launch.bench.head_peer import peer_loss, plain_loss
from launch.bench.head_ranks import expected_bytes, traffic
from launch.bench.peers import arcface_batches, webdataset_batches
from launch.bench.records import RecordWriter
from launch.cli import main
from shards.pack import PackOptions, pack
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.face_folders import write_faces


def test_the_loader_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = write_faces(tmp_path / "faces", {"ada": 5, "bob": 4})
    out = tmp_path / "loader.json"
    sizes = ["--images", "40", "--batch-size", "8", "--memory-images", "80", "--open-images", "9000"]
    assert main(["bench", "loader", "--data", str(faces), *sizes, "--rounds", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert record["reading"]["aroface"]["items"] == record["reading"]["webdataset"]["items"] == 40
    assert record["packing"]["pack"]["items"] == record["packing"]["copy, headers with Pillow"]["items"] == 40
    assert record["machine"]["cores"] >= 1
    figures = {figure["name"]: figure for figure in record["figures"]}
    ours, alone = figures["read with aroface"], figures["read with decode alone"]
    assert ours["limit"] == alone["value"]
    assert ours["of_limit"] == ours["value"] / alone["value"]
    for figure in record["figures"]:
        assert figure["name"] in printed
        assert np.isfinite(figure["value"])
        assert (figure["goal"] is None) == (figure["reached"] is None)


@pytest.mark.slow
def test_exports_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "export.json"
    sizes = ["--depths", "18", "--width", "0.125", "--batches", "1,2", "--images", "2", "--rounds", "1"]
    assert main(["bench", "export", *sizes, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["measurements"]) == {"R18, batch 1", "R18, batch 2"}
    cosines = {name: entry["min_cosine"] for name, entry in record["measurements"]["R18, batch 2"].items()}
    assert len(cosines) == 9
    assert min(cosines[name] for name in cosines if "fp32" in name) > 0.99999
    assert min(cosines[name] for name in cosines if "16" in name) > 0.995
    goals = {figure["name"] for figure in record["figures"] if figure["goal"] is not None}
    assert "R18, batch 1: onnxruntime fp32 / eager" in goals
    limited = {figure["name"] for figure in record["figures"] if figure["of_limit"] is not None}
    assert limited == {f"{title}: {name}" for title, entries in record["measurements"].items() for name in entries}


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of small products and arrays: rates all the same."""
    monkeypatch.setattr(roofline, "_CPU_SIDES", (128,))
    monkeypatch.setattr(roofline, "_CPU_BYTES", 1 << 22)


@pytest.mark.usefixtures("quick_peaks")
def test_the_machine_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "machine.json"
    assert main(["bench", "machine", "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    figures = {figure["name"]: figure["value"] for figure in record["figures"]}
    assert {"fp32 matrix product", "bf16 matrix product", "memory, read and written"} <= set(figures)
    assert all(np.isfinite(value) and value > 0 for value in figures.values())
    assert record["settings"] == {"device": "cpu", "threads": 1}


@pytest.mark.usefixtures("quick_peaks")
def test_the_protocols_are_measured_and_json_is_all_that_stdout_gets(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "protocols", "--scale", "0.01", "--json", "--resamples", "20"]) == 0
    printed, said = capfd.readouterr()
    record = json.loads(printed)
    assert record["settings"] == {"scale": 0.01, "resamples": 20}
    figures = {figure["name"]: figure for figure in record["figures"]}
    assert len(figures) == 13
    assert all(figure["value"] > 0 for figure in figures.values())
    assert all(name in said for name in figures)
    ratio = figures["IJB-S pooling, 500 frames over 50, memory"]
    peaks = [figures[f"IJB-S pooling, {frames} frames a template, memory"]["value"] for frames in (500, 50)]
    assert ratio["value"] == pytest.approx(peaks[0] / peaks[1])
    assert ratio["goal"] == 1.1
    limited = {name for name, figure in figures.items() if figure["limit"] is not None}
    assert len(limited) == 5
    assert not any("bootstrap" in name or "memory" in name for name in limited)
    assert all(figures[name]["of_limit"] > 0 for name in limited)


@pytest.mark.slow
def test_two_checkouts_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "backbones", "--against", str(tmp_path), "--pairs", "1"]) == 2
    assert "git worktree add" in capsys.readouterr().err
    here = Path(__file__).resolve().parents[2]
    command = ["bench", "machine", "--device", "cpu", f"--against={here}", "--pairs=1", "--json"]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    record = json.loads(printed)
    assert record["options"] == "--device cpu"
    assert [len(runs) for runs in record["runs"].values()] == [1, 1]
    for figure in record["figures"]:
        assert figure["ratio"] == figure["here"] / figure["there"]
        assert figure["name"] in said


@pytest.mark.slow
def test_the_head_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    sizes = ["--batch", "16", "--classes", "400", "--rounds", "1"]
    assert main(["bench", "head", *sizes, "--out", str(out)]) == 0
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert all(np.isfinite(figure["value"]) for figure in figures.values())
    exact = [name for name in figures if " off " in name and "bf16" not in name]
    assert len(exact) == 10
    assert all(figures[name]["reached"] for name in exact)
    assert len([name for name in figures if name.endswith("CPU time") and figures[name]["of_limit"] > 0]) == 10


@pytest.mark.slow
def test_exchanges_of_the_head_are_as_few_and_as_small_as_the_formula_says() -> None:
    kinds = {"arcface": 3, "cosface": 3, "combined": 3, "adaface": 3, "magface": 3, "curricularface": 4}
    found = traffic(tuple(kinds), ranks=3, images=5)
    assert found == {kind: (calls, expected_bytes(kind, ranks=3, images=5)) for kind, calls in kinds.items()}


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_the_other_head_computes_what_ours_computes(sample_rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 40, (64,), generator=generator)
    inputs = [torch.randn(rows, 16, generator=generator).requires_grad_() for rows in (64, 40)]
    if sample_rate < 1:  # all classes are positives, so that both heads must take all of them
        labels[:40] = torch.arange(40)
    losses = [peer_loss(*inputs, labels, scale=32.0, margin=0.5, sample_rate=sample_rate)]
    losses += [plain_loss(*inputs, labels, scale=32.0, margin=0.5)]
    config = ArcFaceConfig(
        kind="arcface", logit_scale=32.0, margin=0.5, margin_gradient="straight_through", continuation="plain"
    )
    head = build_head(config, num_classes=40, embedding_dim=16, seed=0)
    head.weight = torch.nn.Parameter(inputs[1].detach().clone())
    own = [inputs[0], head.weight]
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
    losses.append(head(inputs[0], labels, step=0))
    gradients.append(torch.autograd.grad(losses[-1], own))
    for loss, found in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
        for one, other in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_engine_is_measured_beside_ddp(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    sizes = ["--ranks", "1", "--width", "0.125", "--image-size", "16", "--batch-size", "4", "--stages", "0,2"]
    assert main(["bench", "engine", *sizes, "--steps", "1", "--rounds", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["variants"]) == {"DDP", "ZeRO 0", "ZeRO 2"}
    ratios = [figure for figure in record["figures"] if figure["unit"] == "x"]
    assert all(figure["value"] > 0 for figure in ratios)
    assert [figure["limit"] for figure in ratios] == [1.0] * 4


@pytest.mark.parametrize("stages", ["7", "a", ""])
def test_stages_that_do_not_exist_are_refused(stages: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "engine", "--stages", stages])
    assert ended.value.code == 2
    assert "names no ZeRO stages" in capsys.readouterr().err


@pytest.mark.slow
def test_the_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    small = ["--width", "0.125", "--image-size", "32", "--batch", "8", "--classes", "20", "--rounds", "1"]
    assert main(["bench", "step", *small, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    figures = {figure["name"]: figure for figure in record["figures"]}
    assert figures["adversarial / plain"]["goal"] == 1.2
    assert figures["delayed / plain"]["goal"] == 1.05
    assert set(record["ratios"]) | {"plain"} == set(record["steps"])
    assert all(step["items"] == 8 for step in record["steps"].values())
    parts = [f["value"] for name, f in figures.items() if "part of" in name and "warp alone" not in name]
    assert sum(parts) == pytest.approx(100)
    limited = {name for name, figure in figures.items() if figure["limit"] is not None}
    assert limited >= {f"{way}, step" for way in record["steps"]}
    assert limited >= {f"adversarial step, {part}" for part in ("attack", "forward", "backward", "optimisers")}
    assert all(figures[name]["of_limit"] > 0 for name in limited)
    assert 0 <= figures["of it waiting for data"]["value"] <= 100
    assert figures["collectives of a plain step, one rank"]["value"] >= 0
    assert main(["bench", "step", *small, "--ways", "random"]) == 2
    assert "with plain among them" in capsys.readouterr().err


def test_the_step_is_measured_in_both_layouts(tmp_path: Path) -> None:
    out = tmp_path / "layouts.json"
    small = ["--width", "0.125", "--image-size", "16", "--batch", "8", "--classes", "20", "--rounds", "2"]
    assert main(["bench", "step", "--layouts", *small, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    bf16 = ["bf16, channels last"] if has_bf16_units() else []
    assert list(record["steps"]) == ["fp32, contiguous", "fp32, channels last", *bf16]
    assert record["figures"][-1]["goal"] == (2.0 if bf16 else None)
    assert record["figures"][-1]["value"] > 0


def test_the_peers_deliver_what_we_deliver(tmp_path: Path) -> None:
    from aroface.images import decode_rgb

    faces = write_faces(tmp_path / "faces", {"ada": 3, "bob": 2})
    files = [(path.read_bytes(), label) for label, who in enumerate(("ada", "bob")) for path in (faces / who).iterdir()]
    with RecordWriter(tmp_path / "records", classes=2) as writer:
        for image, label in files:
            writer.add(image, label)
    pack(tmp_path / "records", tmp_path / "shards", PackOptions())
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    truth = sorted((label, _mean(decode_rgb(image) / 127.5 - 1)) for image, label in files)
    peer = list(arcface_batches(tmp_path / "records", batch_size=1, workers=0))
    stream = [(2 * images - 1, labels) for images, labels in webdataset_batches(tars, batch_size=1, workers=0)]
    for found in (peer, stream):
        delivered = sorted((int(labels[0]), _mean(images[0])) for images, labels in found)
        assert np.array(delivered) == pytest.approx(np.array(truth), abs=2e-2)


def _mean(image: np.ndarray | torch.Tensor) -> float:
    return float(np.asarray(image).mean())


@pytest.mark.slow
def test_the_service_is_measured_under_load(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run")
    out = tmp_path / "serve.json"
    sizes = ["--clients", "4", "--requests", "16", "--gallery-size", "50", "--batches", "1,4", "--rounds", "1"]
    command = ["bench", "serve", "--model", str(tmp_path / "run"), "--threads", "1", *sizes, "--out", str(out)]
    assert main(command) == 0
    record = json.loads(out.read_text())
    assert set(record["measurements"]) == {"model alone, batch 1", "model alone, batch 4", "service"}
    assert all(figure["value"] > 0 for figure in record["figures"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_peaks")
def test_galleries_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "gallery.json"
    sizes = ["--size", "4000", "--probes", "40", "--rounds", "1", "--work", str(tmp_path)]
    assert main(["bench", "gallery", *sizes, "--out", str(out)]) == 0
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert figures["flat, same entries at the same places"]["value"] == 1
    limited = {name for name, figure in figures.items() if figure["of_limit"] is not None}
    assert limited == {"bare IndexFlatIP", "flat", "flat, 32 probes", "flat, one probe"}
    # one probe bears the reading of all vectors alone
    assert figures["flat, one probe"]["limit"] >= figures["flat"]["limit"]
