"""A checkpoint of ours -> the state dict that `backbones.get_model` of InsightFace arcface_torch loads.

Its code feeds RGB; the first convolution of a BGR network gets its input channels reversed, which is the same network
on RGB. An IR network becomes an IResNet: the projection in stage 1 of an IResNet is set to pass every second pixel on.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aroface.config.model import IRConfig, IResNetConfig, MobileFaceNetConfig, ModelConfig, ViTConfig
from aroface.contract import InputContract
from aroface.engine.checkpoint import load_weights
from aroface.engine.checkpoint_layout import resolve_checkpoint
from aroface.errors import ExportError
from aroface.files import atomic_path
from aroface.inference import read_description
from aroface.models.iresnet import BLOCKS_PER_STAGE

__all__ = ["to_arcface_torch", "write_arcface_torch"]

_BN_EPS = 1e-5
_FIRST_CONVOLUTION = {
    "iresnet": "conv1.weight",
    "ir": "conv1.weight",
    "mobilefacenet": "layers.0.layers.0.weight",
    "vit": "patch_embed.proj.weight",
}
_IR_STEM = {
    "input_layer.0.": "conv1.",
    "input_layer.1.": "bn1.",
    "input_layer.2.": "prelu.",
    "output_layer.0.": "bn2.",
    "output_layer.3.": "fc.",
    "output_layer.4.": "features.",
}
_IR_BLOCK = {
    "res_layer.0.": "bn1.",
    "res_layer.1.": "conv1.",
    "res_layer.2.": "bn2.",
    "res_layer.3.": "prelu.",
    "res_layer.4.": "conv2.",
    "res_layer.5.": "bn3.",
    "shortcut_layer.": "downsample.",
}


def write_arcface_torch(checkpoint: Path, out: Path) -> str:
    """Write the backbone of a run or checkpoint as one file of `torch.save`.

    Returns:
        The name of the network for `get_model`, such as `r100`.

    Raises:
        CheckpointError: no whole checkpoint.
        ExportError: arcface_torch has no such network, or would feed it other numbers.
    """
    directory = resolve_checkpoint(checkpoint)
    config, contract = read_description(directory)
    name, state = to_arcface_torch(config, contract, load_weights(directory))
    with atomic_path(out) as temporary:
        torch.save(state, temporary)
    return name


def to_arcface_torch(
    config: ModelConfig, contract: InputContract, weights: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Name of the network in arcface_torch and its state dict, for RGB input.

    Raises:
        ExportError: arcface_torch has no such network, or would feed it other numbers.
    """
    name = _network(config)
    if (contract.mean, contract.std) != (127.5, 127.5):
        raise ExportError(
            f"arcface_torch feeds (pixel - 127.5) / 127.5, this network wants (pixel - {contract.mean:g}) / "
            f"{contract.std:g}; export it to ONNX instead, which carries its own."
        )
    state = _ir_as_iresnet(weights, config.depth) if isinstance(config, IRConfig) else dict(weights)
    if contract.colour_order == "bgr":
        first = _FIRST_CONVOLUTION[config.kind]
        state[first] = state[first].flip(1).contiguous()
    return name, state


def _network(config: ModelConfig) -> str:
    name = None
    if config.image_size == 112:
        match config:
            case IResNetConfig() | IRConfig():
                name = f"r{100 if config.depth == 101 else config.depth}" if config.width == 1 else None
            case MobileFaceNetConfig():
                name = "mbf" if config.size == "base" else "mbf_large"
            case ViTConfig():
                known = re.fullmatch(r"vit-([tsbl])", config.name)
                name = (
                    {"t": "vit_t", "s": "vit_s", "b": "vit_b", "l": "vit_l_dp005_mask_005"}[known[1]] if known else None
                )
    if name is None:
        raise ExportError(
            f"arcface_torch has no network like {config.name} at {config.image_size} px; it has r18 to r200, mbf, "
            "mbf_large and vit_t to vit_l at width 1 and 112 px. Export to ONNX instead."
        )
    return name


def _ir_as_iresnet(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    places = [
        f"layer{stage}.{block}"
        for stage, blocks in enumerate(BLOCKS_PER_STAGE[100 if depth == 101 else depth], start=1)
        for block in range(blocks)
    ]
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        if match := re.match(r"body\.(\d+)\.", key):
            state[f"{places[int(match[1])]}.{_renamed(key[match.end() :], _IR_BLOCK)}"] = value
        else:
            state[_renamed(key, _IR_STEM)] = value
    channels, dim = len(weights["input_layer.1.weight"]), len(weights["output_layer.3.weight"])
    counter = torch.tensor(0)
    state |= {
        "layer1.0.downsample.0.weight": torch.eye(channels)[:, :, None, None].contiguous(),
        "layer1.0.downsample.1.weight": torch.ones(channels),
        "layer1.0.downsample.1.bias": torch.zeros(channels),
        "layer1.0.downsample.1.running_mean": torch.zeros(channels),
        "layer1.0.downsample.1.running_var": torch.full((channels,), 1 - _BN_EPS),  # a batch norm that changes nothing
        "layer1.0.downsample.1.num_batches_tracked": counter,
        "features.weight": torch.ones(dim),
        "features.bias": torch.zeros(dim),
    }
    return state


def _renamed(key: str, table: Mapping[str, str]) -> str:
    old = next(old for old in table if key.startswith(old))
    return table[old] + key.removeprefix(old)
