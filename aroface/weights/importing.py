"""A weight file of another project -> a checkpoint of ours that holds weights and contract, and nothing to resume."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from aroface import __version__
from aroface.config.load import read_yaml
from aroface.config.model import ModelConfig
from aroface.contract import ColourOrder, InputContract
from aroface.engine.checkpoint_layout import (
    BACKBONE_FILE,
    FORMAT_VERSION,
    finish_checkpoint,
    start_checkpoint,
    write_state,
)
from aroface.errors import ConfigError
from aroface.files import new_directory, sha256_of
from aroface.weights.layouts import recognise
from aroface.weights.tensor_files import read_tensors, refuse_bad_numbers

__all__ = ["ImportedWeights", "read_weights", "write_weights"]

#: What the code of each project feeds its networks; CVLface says it in a file beside the weights.
_COLOUR_OF_LAYOUT: dict[str, ColourOrder] = {"arcface_torch": "rgb", "adaface": "bgr"}


@dataclass(frozen=True)
class ImportedWeights:
    """A network with weights, and what has to be known to use it."""

    model: ModelConfig
    contract: InputContract
    tensors: dict[str, Tensor]  #: float32, by our names
    source: dict[str, Any]  #: file, hash, layout, prefix, where the colour order is from


def read_weights(
    path: Path, *, colour_order: ColourOrder | None = None, image_size: int | None = None, heads: int | None = None
) -> ImportedWeights:
    """Read and check a weight file of arcface_torch, the ARoFace release, AdaFace or CVLface.

    Args:
        path: `.pt`, `.pth`, `.ckpt` or `.safetensors`.
        colour_order: channel order that the network was trained with; None: as its project does it.
        image_size: side of the input, pixels; None: 112 where it fits.
        heads: attention heads of a transformer that is none of the published ones.

    Raises:
        DataError: the file is no weight file, or holds more than tensors.
        CheckpointError: a network that is not known, or weights that are not finite.
        ConfigError: what the file does not tell has to be given.
    """
    found = recognise(read_tensors(path), name=str(path), image_size=image_size, heads=heads)
    tensors = _checked(found.tensors, found.prefix, path)
    colour, reason = (colour_order, "given") if colour_order else _colour_order(path, found.layout)
    contract = InputContract(image_size=found.config.image_size, colour_order=colour)
    source = {
        "file": path.name,
        "sha256": sha256_of(path),
        "layout": found.layout,
        "prefix": found.prefix,
        "colour_order_from": reason,
        "tensors_ignored": found.ignored,
    }
    return ImportedWeights(found.config, contract, tensors, source)


def write_weights(weights: ImportedWeights, out: Path) -> Path:
    """Write a run directory with one checkpoint, `step-00000000`; returns the directory of the checkpoint.

    Raises:
        DataError: `out` holds something already.
    """
    new_directory(out, what="--out")
    temporary = start_checkpoint(out, 0)
    save_file(weights.tensors, temporary / BACKBONE_FILE)
    state = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "samples_seen": 0,
        "model": weights.model.model_dump(mode="json"),
        "contract": weights.contract.model_dump(mode="json"),
        "source": weights.source,
        "versions": {"aroface": __version__, "torch": torch.__version__},
    }
    write_state(temporary, state)
    return finish_checkpoint(temporary, out, 0)


def _checked(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """Float32 copies, refused unless they are numbers that a network can compute with."""
    result = {}
    for name, value in tensors.items():
        if not value.is_floating_point():
            result[name] = value.clone()
            continue
        number = value.to(torch.float32, copy=True).contiguous()
        refuse_bad_numbers(name, number, f"{path}: {prefix}{name}")
        result[name] = number
    return result


def _colour_order(path: Path, layout: str) -> tuple[ColourOrder, str]:
    if layout in _COLOUR_OF_LAYOUT:
        return _COLOUR_OF_LAYOUT[layout], f"the {layout} layout"
    if layout == "cvlface":
        beside = [path.with_suffix(".yaml"), path.parent / "model.yaml", path.parent / "config.json"]
        beside.append(path.parent / "pretrained_model" / "model.yaml")
        for candidate in beside:
            if candidate.is_file():
                for value in _color_spaces(candidate):
                    if value.lower() in ("rgb", "bgr"):
                        return cast(ColourOrder, value.lower()), candidate.name
        looked = "no color_space in model.yaml or config.json beside it"
    else:
        looked = "IR weights without the prefix of AdaFace or CVLface"
    raise ConfigError(
        f"{path}: nothing tells whether the network was trained on RGB or BGR ({looked}). Give --colour-order: the "
        "networks of AdaFace take bgr, those that CVLface and arcface_torch trained take rgb. The wrong one costs "
        "accuracy without an error."
    )


def _color_spaces(path: Path) -> Iterator[str]:
    """Every `color_space` in a YAML or JSON file, at any depth."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        pending = [json.loads(text) if path.suffix == ".json" else read_yaml(text, name=str(path))]
    except (json.JSONDecodeError, ConfigError):
        return
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("color_space"), str):
                yield value["color_space"]
            pending += value.values()
