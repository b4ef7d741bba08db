"""Weights of another project through the commands: import, export, embed, train from them; and what they cannot do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aroface.inference import load_embedder
from launch.cli import main
from tests.helpers import layouts

CONFIG = str(Path(__file__).parents[2] / "configs" / "smoke" / "tiny.yaml")


@pytest.fixture
def imported(tmp_path):
    """The network of the smoke configuration, written as arcface_torch would and imported."""
    state = layouts.random_state(layouts.iresnet(18, width=8, dim=16, side=2))
    torch.save(state, tmp_path / "backbone.pt")
    run = tmp_path / "imported"
    assert main(["import", str(tmp_path / "backbone.pt"), "--out", str(run)]) == 0
    return run


def train(run, shards, *overrides):
    return main(["train", CONFIG, f"data.shards={shards}", *overrides, "--run", str(run)])


def test_training_starts_from_imported_weights(tmp_path, imported, drawn_shards, caplog):
    caplog.set_level("INFO")
    settings = [
        f"model.init_from={imported}",
        "schedule.epochs=0.5",
        "schedule.warmup_epochs=0.1",
        "optim.lr_per_1024=1e-6",
    ]
    assert train(tmp_path / "tuned", drawn_shards, *settings) == 0
    assert f"The weights are those of {imported}" in caplog.text
    (last,) = sorted((tmp_path / "tuned").glob("step-*"))[-1:]
    before, after = (load_file(d / "backbone.safetensors") for d in (imported / "step-00000000", last))
    # so small a rate leaves the weights where they were, while the statistics move
    torch.testing.assert_close(after["fc.weight"], before["fc.weight"], rtol=0, atol=1e-4)
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    config = json.loads((last / "state.json").read_text())["config"]
    assert config["model"]["init_from"] == str(imported)


def test_weights_for_another_input_or_network_are_refused(tmp_path, imported, drawn_shards, capsys):
    assert train(tmp_path / "a", drawn_shards, f"model.init_from={imported}", "data.colour_order=bgr") == 2
    assert "Set data.colour_order and model.image_size as the weights want them" in capsys.readouterr().err
    assert train(tmp_path / "b", drawn_shards, f"model.init_from={imported}", "model.depth=34") == 2
    error = capsys.readouterr().err
    assert "is of another network" in error
    assert "the first is layer1.2.bn1.weight" in error
    assert "The file holds iresnet18" in error


def test_imported_weights_can_be_neither_resumed_nor_attacked(tmp_path, imported, drawn_shards, capsys):
    assert train(imported, drawn_shards) == 2
    assert "holds weights only, imported from backbone.pt" in capsys.readouterr().err
    run = ["train", CONFIG, f"data.shards={drawn_shards}", "--run", str(tmp_path / "x"), "--resume", str(imported)]
    assert main(run) == 2
    assert "start a new run in another --run directory with model.init_from=" in capsys.readouterr().err
    assert main(["attack", str(imported), "--out", str(tmp_path / "x.png")]) == 2
    assert "holds weights only" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "options", "prefix"),
    [
        (layouts.iresnet(18, width=8, dim=16, side=2), [], ""),
        (layouts.ir(18, width=8, dim=16, side=2), ["--colour-order", "bgr"], "model."),
        (layouts.mobilefacenet(dim=16, side=2), [], ""),
        (layouts.vit(32, 2, size=36, dim=16), ["--heads", "4"], "module."),
    ],
    ids=["iresnet", "ir", "mobilefacenet", "vit"],
)
def test_every_kind_exports_to_onnx_with_the_same_embeddings(tmp_path, shapes, options, prefix):
    state = layouts.behind(prefix, layouts.random_state(shapes))
    torch.save({"state_dict": state}, tmp_path / "theirs.pt")
    run, file = tmp_path / "run", tmp_path / "model.onnx"
    assert main(["import", str(tmp_path / "theirs.pt"), "--out", str(run), *options]) == 0
    assert main(["export", str(run), "--out", str(file)]) == 0
    from export.runtime import OnnxEmbedder

    ours, exported = load_embedder(run), OnnxEmbedder(file)
    assert exported.contract == ours.contract
    size = ours.contract.image_size
    faces = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    np.testing.assert_allclose(exported.embed(faces), ours.embed(faces), rtol=1e-3, atol=1e-3)
