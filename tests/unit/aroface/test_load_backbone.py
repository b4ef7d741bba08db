"""Backbones out of our own checkpoints: another network and numbers of no use are refused by name."""

import pytest
from safetensors.torch import load_file, save_file

from aroface.config.model import IResNetConfig
from aroface.engine.checkpoint import load_backbone
from aroface.engine.checkpoint_layout import BACKBONE_FILE
from aroface.errors import CheckpointError
from aroface.models import build_backbone
from tests.helpers.checkpoints import tiny_backbone, tiny_config, write_checkpoint


def test_our_own_checkpoint_of_another_network_names_the_nearest(tmp_path):
    directory = write_checkpoint(tmp_path)
    other = build_backbone(IResNetConfig(kind="iresnet", depth=34, embedding_dim=16, image_size=32, width=0.125))
    with pytest.raises(CheckpointError, match=r"the first is layer1\.2\.bn1\.weight.*The file holds iresnet18-w0\.125"):
        load_backbone(directory, other)
    tensors = load_file(directory / BACKBONE_FILE)
    save_file({name: value for name, value in tensors.items() if name != "bn1.bias"}, directory / BACKBONE_FILE)
    with pytest.raises(CheckpointError, match=r"the first is bn1\.bias.*nearest known network"):
        load_backbone(directory, tiny_backbone(tiny_config()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer1.0.conv1.weight", float("nan"), "conv1.weight holds 1 values that are not finite"),
        ("features.running_var", -1.0, "features.running_var holds negative variances"),
    ],
)
def test_our_own_checkpoint_with_numbers_of_no_use_is_refused(tmp_path, name, value, message):
    directory = write_checkpoint(tmp_path)
    tensors = load_file(directory / BACKBONE_FILE)
    tensors[name].view(-1)[0] = value
    save_file(tensors, directory / BACKBONE_FILE)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(directory, tiny_backbone(tiny_config()))
