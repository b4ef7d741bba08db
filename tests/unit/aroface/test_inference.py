import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aroface.contract import InputContract
from aroface.engine.checkpoint_layout import BACKBONE_FILE, STATE_FILE, finish_checkpoint, start_checkpoint
from aroface.errors import CheckpointError, ShapeError
from aroface.inference import TorchEmbedder, load_embedder, load_model, untrained_model
from aroface.preprocess import normalise
from tests.helpers.checkpoints import IMAGE_SIZE, tiny_model, write_checkpoint


def _faces(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_normalise_equals_the_formula_in_numpy(order: str) -> None:
    contract = InputContract(image_size=IMAGE_SIZE, colour_order=order, mean=100.0, std=50.0)
    faces = _faces(2)
    expected = ((faces if order == "rgb" else faces[..., ::-1]).astype(np.float64) - 100) / 50
    got = normalise(torch.from_numpy(faces), contract)
    np.testing.assert_allclose(got.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_normalise_refuses_floats() -> None:
    with pytest.raises(ShapeError, match="must be uint8 RGB"):
        normalise(torch.zeros(1, 8, 8, 3), InputContract(image_size=16, colour_order="rgb"))


def test_a_run_and_its_step_give_the_model_that_was_saved(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, step=3)
    step = write_checkpoint(tmp_path, step=12)
    by_run, by_step = load_embedder(tmp_path), load_embedder(step)
    faces = _faces(3)
    np.testing.assert_array_equal(by_run.embed(faces), by_step.embed(faces))
    assert by_run.model_id == by_step.model_id
    assert by_run.model_id.startswith("iresnet18-w0.125-")
    with torch.no_grad():
        expected = load_model(step).backbone(normalise(torch.from_numpy(faces), by_run.contract)).numpy()
    np.testing.assert_allclose(by_run.embed(faces), expected, atol=1e-4)


def test_a_bgr_model_sees_the_channels_reversed() -> None:
    faces = _faces(2)
    rgb, bgr = tiny_model("rgb"), tiny_model("bgr")
    reversed_channels = np.ascontiguousarray(faces[..., ::-1])
    np.testing.assert_allclose(
        TorchEmbedder(bgr).embed(faces), TorchEmbedder(rgb).embed(reversed_channels), rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(TorchEmbedder(rgb).embed(faces), TorchEmbedder(bgr).embed(faces))


def test_internal_batching_does_not_change_the_embeddings() -> None:
    faces = _faces(7)
    whole = TorchEmbedder(tiny_model()).embed(faces)
    parts = TorchEmbedder(tiny_model(), batch_size=3).embed(faces)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)
    assert TorchEmbedder(tiny_model()).embed(faces[:0]).shape == (0, 16)


def test_bf16_stays_close_to_fp32() -> None:
    faces = _faces(4)
    a = TorchEmbedder(tiny_model()).embed(faces)
    b = TorchEmbedder(tiny_model(), precision="bf16").embed(faces)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert b.dtype == np.float32
    assert cosine.min() > 0.999
    assert not np.array_equal(a, b)


def test_untrained_weights_differ_and_leave_the_generator_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    before = torch.get_rng_state()
    untrained = untrained_model(tmp_path, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert untrained.model_id.endswith("-untrained")
    trained = load_model(tmp_path)
    assert not torch.equal(untrained.backbone.fc.weight, trained.backbone.fc.weight)
    assert torch.equal(untrained.backbone.fc.weight, untrained_model(tmp_path, seed=1).backbone.fc.weight)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError, match="resize faces"):
        TorchEmbedder(tiny_model()).embed(np.zeros((1, 16, 16, 3), np.uint8))


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a run directory"):
        load_embedder(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path / "good")
    state = json.loads((good / STATE_FILE).read_text())
    bad = start_checkpoint(tmp_path / "bad", 1)
    save_file({"fc.weight": torch.zeros(2, 2)}, bad / BACKBONE_FILE)
    (bad / STATE_FILE).write_text(json.dumps(state))
    finish_checkpoint(bad, tmp_path / "bad", 1)
    with pytest.raises(CheckpointError, match="do not mix files of two checkpoints"):
        load_model(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"), [({"contract": None}, "lacks contract"), ({"image_size": 48}, "contradicts itself")]
)
def test_a_state_that_does_not_describe_the_model_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    good = write_checkpoint(tmp_path / "good")
    state = json.loads((good / STATE_FILE).read_text())
    if "image_size" in change:
        state["contract"]["image_size"] = change["image_size"]
    else:
        del state["contract"]
    bad = start_checkpoint(tmp_path / "bad", 1)
    (bad / BACKBONE_FILE).write_bytes((good / BACKBONE_FILE).read_bytes())
    (bad / STATE_FILE).write_text(json.dumps(state))
    finish_checkpoint(bad, tmp_path / "bad", 1)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "bad")
