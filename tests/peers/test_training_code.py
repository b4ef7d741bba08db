"""Steps and loader of other projects; with their own code where AROFACE_PEERS names a folder with checkouts."""

import json
import os
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from aroface.bf16 import has_bf16_units
from aroface.engine.deepspeed_engine import start_distributed
from launch.bench.head_peer import peer_loss
from launch.bench.peers import arcface_batches
from launch.bench.records import RecordWriter
from tests.helpers.face_folders import write_faces
from tests.peers import compare_training, loader_code
from tests.peers.training_code import PeerStep, training_code

ROOT = os.environ.get("AROFACE_PEERS")
needs_checkouts = pytest.mark.skipif(not ROOT, reason="AROFACE_PEERS does not name a folder with checkouts")
FOLDERS = (compare_training.ARCFACE, compare_training.ATTACK)

#: The names that a checkout must have, over the plainest network and loss there are.
STAND_IN = {
    "backbones/__init__.py": """
        import torch
        class Network(torch.nn.Module):
            def __init__(self, num_features):
                super().__init__()
                self.layer = torch.nn.Linear(3, num_features)
            def forward(self, images):
                return self.layer(images.mean((2, 3)))
        def get_model(name, *, dropout, fp16, num_features):
            return Network(num_features)
        """,
    "partial_fc_v2.py": """
        import torch
        class PartialFC_V2(torch.nn.Module):
            def __init__(self, margin_loss, embedding_size, num_classes, sample_rate, fp16):
                super().__init__()
                assert torch.distributed.is_initialized()
                self.weight = torch.nn.Parameter(torch.randn(num_classes, embedding_size))
            def forward(self, embeddings, labels):
                cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(self.weight).T
                return torch.nn.functional.cross_entropy(64 * cosines.cuda(), labels)
        """,
    "losses.py": "class CombinedMarginLoss:\n    def __init__(self, *settings):\n        pass\n",
    "AdvWarp.py": """
        def adversarial_img_warping(backbone, img, module_partial_fc, local_labels, **settings):
            return img.flip(3), local_labels
        """,
}


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    for name, text in STAND_IN.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path / "code"


def test_a_step_trains_their_network_and_leaves_pytorch_as_it_was(stand_in):
    start_distributed()
    cuda = torch.Tensor.cuda
    step = PeerStep(training_code(stand_in), depth=18, batch=8, classes=5, precision="fp32")
    losses = []
    for _ in range(5):
        assert step.plain() == 8
        losses.append(step.loss)
    assert losses[-1] < losses[0]
    assert step.attacked() == 8
    assert torch.Tensor.cuda is cuda


def test_the_stand_in_of_mxnet_reads_what_was_written(tmp_path):
    faces = sorted(write_faces(tmp_path / "faces", {"ada": 3}).rglob("*.*"))
    images = [path.read_bytes() for path in faces if path.is_file()]
    with RecordWriter(tmp_path / "records", classes=9) as writer:
        for label, image in enumerate(images):
            writer.add(image, label + 5)
    records = loader_code._Records(str(tmp_path / "records/train.idx"), str(tmp_path / "records/train.rec"), "r")
    assert records.keys == list(range(len(images)))
    for key in reversed(records.keys):
        header, image = loader_code._unpack(records.read_idx(key))
        assert (header.flag, header.label, image) == (0, key + 5, images[key])
    assert loader_code._decode(images[0]).asnumpy().shape[2] == 3


def test_nothing_to_compare_is_said(tmp_path, capsys):
    assert compare_training.main([str(tmp_path)]) == 1
    assert "holds neither" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_steps_are_compared_whatever_the_checkouts_hold(stand_in, tmp_path):
    for folder in FOLDERS:
        shutil.copytree(stand_in, tmp_path / folder)
    (tmp_path / compare_training.ARCFACE / "AdvWarp.py").unlink()
    out = tmp_path / "peers.json"
    sizes = ["--batch", "8", "--classes", "20", "--rounds", "1"]
    assert compare_training.main([str(tmp_path), "--parts", "step", *sizes, "--out", str(out)]) == 0
    step = json.loads(out.read_text())["step"]
    without = set() if has_bf16_units() else {"arcface_torch with bf16 autocast / ours, plain"}
    assert set(step["ratios"]) == {title for title, _, _ in compare_training._step_ratios()} - without
    assert step["settings"]["logit_precision"] == "fp32"


@needs_checkouts
@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_their_step_minimises_arcface(folder):
    start_distributed()
    code = training_code(Path(ROOT) / folder)
    step = PeerStep(code, depth=18, batch=8, classes=50, precision="fp32")
    with torch.no_grad():  # a pass in training mode: its output does not depend on the running statistics
        embeddings = step._network(step._images)
        expected = peer_loss(embeddings, step._classifier.weight, step._labels, scale=64.0, margin=0.5)
    assert step.plain() == 8
    assert step.loss == pytest.approx(float(expected), rel=1e-5)
    assert (code.attack is not None) == (folder == compare_training.ATTACK)
    if code.attack is not None:
        assert step.attacked() == 8


@needs_checkouts
def test_their_loader_delivers_what_the_plain_rebuild_delivers(tmp_path):
    faces = [p for p in sorted(write_faces(tmp_path / "faces", {"ada": 5, "bob": 4}).rglob("*.*")) if p.is_file()]
    with RecordWriter(tmp_path / "records", classes=9) as writer:
        for label, path in enumerate(faces):
            writer.add(path.read_bytes(), label)
    folder = Path(ROOT) / compare_training.ARCFACE
    with loader_code.arcface_loader(folder, tmp_path / "records", batch_size=1, workers=0) as batches:
        theirs = sorted(float(images.mean()) for images in batches)
    rebuilt = sorted(float(b[0].mean()) for b in arcface_batches(tmp_path / "records", batch_size=1, workers=0))
    assert len(theirs) == len(faces)
    np.testing.assert_allclose(theirs, rebuilt, atol=1e-6)


@needs_checkouts
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_is_compared(tmp_path):
    out = tmp_path / "peers.json"
    sizes = ["--batch", "8", "--classes", "50", "--rounds", "1", "--images", "40", "--workers", "0"]
    assert compare_training.main([ROOT, *sizes, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["step"]["ratios"]) == {title for title, _, _ in compare_training._step_ratios()}
    assert record["loader"]["measurements"]["arcface_torch"]["items"] == 40
    assert all(len(commit) == 40 for commit in record["commits"].values())
