"""Head files of a checkpoint: every kind's statistics survive, at any number of ranks; others are refused."""

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from aroface.config.head import HeadConfig
from aroface.engine.checkpoint import head_contents, load_head
from aroface.engine.checkpoint_layout import head_file
from aroface.errors import CheckpointError
from aroface.heads import HeadSGD, build_head
from tests.helpers.head_oracle import HEADS

KINDS = ["arcface", "cosface", "combined", "adaface", "curricularface", "magface"]
CLASSES, DIM = 11, 4


def make(name, *, classes=CLASSES, seed=0, rank=0, ranks=1):
    config = TypeAdapter(HeadConfig).validate_python(HEADS[name])
    head = build_head(config, num_classes=classes, embedding_dim=DIM, seed=seed, rank=rank, world_size=ranks)
    return head, HeadSGD(head, momentum=0.9, weight_decay=0.0)


def save(folder, name, ranks):
    """A checkpoint of trained centres, momenta and statistics; returns what it holds."""
    weights, momenta, statistics = [], [], {}
    for rank in range(ranks):
        head, optimizer = make(name, rank=rank, ranks=ranks)
        with torch.no_grad():
            optimizer.momentum_buffer.copy_(torch.randn(len(head.weight), DIM))
            for i, value in enumerate(head.statistics().values()):
                value.fill_(1.25 + i)
        contents = head_contents(head, optimizer)
        save_file(contents.tensors, folder / head_file(rank, ranks), metadata=contents.metadata)
        weights.append(head.weight.detach())
        momenta.append(optimizer.momentum_buffer)
        statistics = {key: float(value) for key, value in head.statistics().items()}
    return torch.cat(weights), torch.cat(momenta), statistics


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_survives(tmp_path, name, ranks):
    weights, momenta, statistics = save(tmp_path, name, ranks[0])
    assert set(statistics) == {"adaface": {"norm_mean", "norm_std"}, "curricularface": {"t"}}.get(name, set())
    for rank in range(ranks[1]):
        head, optimizer = make(name, seed=9, rank=rank, ranks=ranks[1])
        load_head(tmp_path, head, optimizer)
        start, stop = head.class_range
        assert torch.equal(head.weight, weights[start:stop])
        assert torch.equal(optimizer.momentum_buffer, momenta[start:stop])
        assert {key: float(value) for key, value in head.statistics().items()} == statistics


def test_statistics_of_another_kind_are_refused(tmp_path):
    save(tmp_path, "arcface", 1)
    with pytest.raises(CheckpointError, match=r"has no t, which head.kind = curricularface keeps.*Set `head` as in"):
        load_head(tmp_path, *make("curricularface"))


def test_another_number_of_classes_is_refused(tmp_path):
    save(tmp_path, "arcface", 2)
    with pytest.raises(CheckpointError, match=r"has 11 classes, the training set 12.*Take the data the run was"):
        load_head(tmp_path, *make("arcface", classes=12))
    with pytest.raises(CheckpointError, match=r"has 11 classes, the training set 6"):
        load_head(tmp_path, *make("arcface", classes=6))
