"""The table of the backbones: its counters against counting by hand and against what a real pass keeps."""

import json
import math

import pytest
import torch
from torch import nn

from aroface.models import IResNet
from launch.bench.backbones import PUBLISHED, activation_bytes, forward_flops, measure
from launch.cli import main
from tests.helpers import layouts


def test_flops_of_layers_that_can_be_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 8 * 8, 7))
    assert forward_flops(net, torch.zeros(2, 3, 8, 8)) == 2 * (2 * 8 * 8 * 5 * 27 + 2 * 5 * 8 * 8 * 7)


def test_activations_of_layers_that_can_be_counted_by_hand():
    net = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False), nn.Sigmoid())
    # kept: the output of ReLU for itself and the second layer, and the output of the sigmoid; not what goes into ReLU
    assert activation_bytes(net, torch.zeros(6, 10)) == 4 * 6 * (20 + 5)


def test_activations_are_what_autograd_saves():
    net = IResNet(18, width=0.125, image_size=32, embedding_dim=8)
    images, saved = torch.randn(4, 3, 32, 32), {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = net.train()(images)
    for tensor in (images, *net.parameters(), *net.buffers()):
        saved.pop(tensor.untyped_storage()._cdata, None)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert activation_bytes(net, images) == pytest.approx(kept + embeddings.nbytes, rel=0.02)


def test_multiply_adds_of_r50_are_the_published_ones():
    row = measure("iresnet50", PUBLISHED["iresnet50"])
    assert row["flops"] / 2e9 == pytest.approx(6.33, abs=0.03)  # InsightFace's 6.33 G counts norms as well
    learned = {k: v for k, v in layouts.iresnet(50).items() if "running" not in k and "tracked" not in k}
    assert row["parameters"] == sum(math.prod(shape) for shape in learned.values())
    assert row["recomputed_activation_bytes"] < 0.4 * row["activation_bytes"]


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    assert main(["bench", "backbones", "--only", "vit-t", "--out", str(tmp_path / "x.json")]) == 0
    assert "| vit-t |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "x.json").read_text())["backbones"]
    assert row["flops"] > 1e9
    assert main(["bench", "backbones", "--only", "r50"]) == 2
    assert "choose from iresnet18" in capsys.readouterr().err
