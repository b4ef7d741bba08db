"""Which network a set of tensors belongs to: the known layouts, told by the names and shapes in them.

A network is recognised by one name that no other has, wherever in the file it lies; what stands in front of that name
is the prefix that a trainer added. Sizes follow from shapes. Then every name and shape is compared.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aroface.config.load import parse_config
from aroface.config.model import VIT_SIZES, ModelConfig, ModelSection
from aroface.errors import CheckpointError, ConfigError
from aroface.models import build_backbone
from aroface.models.iresnet import BLOCKS_PER_STAGE

__all__ = ["FAMILIES", "Recognised", "recognise"]

Shapes = Mapping[str, tuple[int, ...]]

#: Attention heads do not show in weights: (width, depth, mlp_ratio, patch) -> heads of the published transformers.
_VIT_HEADS: dict[tuple[int, int, float, int], int] = {
    **{(width, depth, 4.0, 9): 8 for width, depth in VIT_SIZES.values()},
    (1024, 48, 4.0, 9): 8,
    (512, 12, 5.0, 8): 8,  # CVLface small
    (512, 24, 3.0, 8): 16,  # CVLface base
}


@dataclass(frozen=True)
class Recognised:
    """A network found in a file."""

    config: ModelConfig
    layout: str  #: `arcface_torch`, `adaface`, `cvlface`, or `ir` for IR weights of unknown origin
    prefix: str  #: stood in front of every name
    tensors: dict[str, Tensor]  #: by our names, with the types of the file
    ignored: int  #: tensors of the file that are no part of the backbone


def recognise(
    tensors: Mapping[str, Tensor], *, name: str, image_size: int | None = None, heads: int | None = None
) -> Recognised:
    """Find the network in the tensors of a file.

    Args:
        tensors: as `read_tensors` gives them.
        name: of the file, for messages.
        image_size: side of the input, pixels; None: 112 where it fits, else what the shapes say.
        heads: attention heads of a transformer; None: those of the published one of this size.

    Raises:
        CheckpointError: another network; the first tensor that differs and the nearest known layout are named.
        ConfigError: the number of attention heads is not known.
    """
    found = [(family, prefix) for family in FAMILIES for prefix in _prefixes(tensors, FAMILIES[family].anchor)]
    if not found:
        raise _of_no_family(tensors, name)
    if len(found) > 1:
        choices = ", ".join(f"{prefix or '(none)'} ({family})" for family, prefix in found)
        raise CheckpointError(
            f"{name} holds several networks, with the prefixes {choices}; save the state dict of one of them alone."
        )
    family, prefix = found[0]
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    settings = FAMILIES[family].settings(shapes)
    if image_size is not None:
        settings["image_size"] = image_size
    layout = _layout(family, prefix)
    if family == "vit":
        settings["heads"] = heads if heads is not None else _heads(settings, name)
    try:
        config = parse_config({"model": settings}, ModelSection, name=f"{name}, sizes read from its shapes").model
        with torch.device("meta"):
            expected = {key: tuple(v.shape) for key, v in build_backbone(config).state_dict().items()}
    except ConfigError as error:
        raise CheckpointError(f"{name} looks like {layout} {family}, but no network has its sizes. {error}") from error
    _complete(own, shapes, expected)
    _compare(shapes, expected, what=f"{name} ({layout} layout, prefix {prefix!r})", network=config.name)
    return Recognised(config, layout, prefix, own, ignored=len(tensors) - len(own))


def _prefixes(tensors: Mapping[str, Tensor], anchor: str) -> list[str]:
    ends = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor)]
    return [prefix for prefix in ends if prefix == "" or prefix.endswith(".")]


def _layout(family: str, prefix: str) -> str:
    if prefix.endswith("net."):
        return "cvlface"
    if family == "ir":
        return "adaface" if prefix == "model." else "ir"
    return "arcface_torch"


def _complete(own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], expected: Shapes) -> None:
    """Add what some projects leave out because inference does not need it."""
    for key, shape in expected.items():
        if key not in own and (key.endswith("num_batches_tracked") or key == "mask_token"):
            own[key] = torch.zeros(shape, dtype=torch.int64 if not shape else torch.float32)
            shapes[key] = shape


def _compare(found: Shapes, expected: Shapes, *, what: str, network: str) -> None:
    wrong = [key for key in [*expected, *found] if found.get(key) != expected.get(key)]
    if not wrong:
        return
    first = wrong[0]
    if first not in found:
        problem = f"{first} {expected[first]} is missing"
    elif first not in expected:
        problem = f"{first} {found[first]} has no place in it"
    else:
        problem = f"{first} has the shape {found[first]} instead of {expected[first]}"
    raise CheckpointError(
        f"{what} is another architecture: {len(set(wrong))} tensors differ from {network}, the nearest known network, "
        f"the first: {problem}. Known are {_known()}; convert it to one of these, or export it to ONNX with its own "
        "code."
    )


def _of_no_family(tensors: Mapping[str, Tensor], name: str) -> CheckpointError:
    """Hold the names against the smallest member of every family."""
    best, overlap, missing = "", -1, ""
    for family, entry in FAMILIES.items():
        with torch.device("meta"):
            config = parse_config({"model": entry.settings({})}, ModelSection, name=family).model
            expected = list(build_backbone(config).state_dict())
        shared = sum(any(key == own or key.endswith(f".{own}") for key in tensors) for own in expected)
        if shared > overlap:
            lacking = [own for own in expected if not any(k == own or k.endswith(f".{own}") for k in tensors)]
            best, overlap, missing = family, shared, lacking[0]
    first = next(iter(tensors))
    return CheckpointError(
        f"{name} holds none of the known networks. Its first tensor is {first} {tuple(tensors[first].shape)}; the "
        f"nearest known layout is {best} ({FAMILIES[best].origin}), of which {missing} is the first tensor that is "
        f"not there. Known are {_known()}."
    )


def _known() -> str:
    return ", ".join(f"{family} ({entry.origin})" for family, entry in FAMILIES.items())


def _size_of(side: float, downsampling: int = 16) -> int:
    """Image size from the side of the last feature map: 112 where it fits."""
    return 112 if math.ceil(112 / downsampling) == side else int(side * downsampling)


def _nearest_depth(blocks: int) -> int:
    return min(BLOCKS_PER_STAGE, key=lambda depth: abs(sum(BLOCKS_PER_STAGE[depth]) - blocks))


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match.group(0) for key in shapes if (match := re.match(pattern, key))})


def _residual(shapes: Shapes, *, stem: str, linear: str, blocks: str) -> dict[str, Any]:
    """Sizes that IResNet and IR read from the same places."""
    channels = shapes.get(stem, (64,))[0]
    dim, features = (*shapes.get(linear, ()), 512, 25088)[:2]
    side = math.sqrt(features / (8 * channels))
    return {
        "depth": _nearest_depth(_count(shapes, blocks)),
        "width": channels / 64,
        "embedding_dim": dim,
        "image_size": _size_of(side) if side.is_integer() else 112,
    }


def _iresnet(shapes: Shapes) -> dict[str, Any]:
    sizes = _residual(shapes, stem="conv1.weight", linear="fc.weight", blocks=r"layer\d\.\d+\.")
    return {"kind": "iresnet", **sizes}


def _ir(shapes: Shapes) -> dict[str, Any]:
    sizes = _residual(shapes, stem="input_layer.0.weight", linear="output_layer.3.weight", blocks=r"body\.\d+\.")
    depth = {100: 101, 200: 101}.get(sizes["depth"], sizes["depth"])
    return {"kind": "ir", **sizes, "depth": depth}


def _mobilefacenet(shapes: Shapes) -> dict[str, Any]:
    stem = shapes.get("layers.0.layers.0.weight", (128,))[0]
    side = shapes.get("features.layers.0.layers.0.weight", (512, 1, 7, 7))[-1]
    return {
        "kind": "mobilefacenet",
        "size": "large" if stem == 256 else "base",
        "embedding_dim": shapes.get("features.layers.2.weight", (512,))[0],
        "image_size": _size_of(side),
    }


def _vit(shapes: Shapes) -> dict[str, Any]:
    _, patches, width = shapes.get("pos_embed", (1, 144, 512))
    patch = shapes.get("patch_embed.proj.weight", (0, 0, 9))[2]
    grid = math.isqrt(patches)
    hidden = shapes.get("blocks.0.mlp.fc1.weight", (4 * width,))[0]
    return {
        "kind": "vit",
        "width": width,
        "depth": max(1, _count(shapes, r"blocks\.\d+\.")),
        "patch": patch,
        "mlp_ratio": hidden / width,
        "drop_path": 0.0,
        "mask_ratio": 0.0,
        "embedding_dim": shapes.get("feature.2.weight", (512,))[0],
        "image_size": 112 if 112 // patch == grid else patch * grid,
    }


def _heads(settings: Mapping[str, Any], name: str) -> int:
    shape = (settings["width"], settings["depth"], settings["mlp_ratio"], settings["patch"])
    if shape not in _VIT_HEADS:
        raise ConfigError(
            f"{name} holds a transformer of width {shape[0]}, depth {shape[1]}, mlp_ratio {shape[2]:g} and patch "
            f"{shape[3]}, which is none of the published ones. The number of attention heads does not show in the "
            "weights; give it with --heads."
        )
    return _VIT_HEADS[shape]


@dataclass(frozen=True)
class _Family:
    anchor: str  #: a name that only this family has
    origin: str
    settings: Callable[[Shapes], dict[str, Any]]  #: `model` section from shapes; tolerant of anything


FAMILIES: dict[str, _Family] = {
    "iresnet": _Family("layer1.0.prelu.weight", "arcface_torch, the ARoFace release, CVLface", _iresnet),
    "ir": _Family("body.0.res_layer.1.weight", "AdaFace, CVLface", _ir),
    "mobilefacenet": _Family("conv_sep.layers.0.weight", "arcface_torch", _mobilefacenet),
    "vit": _Family("patch_embed.proj.weight", "arcface_torch, CVLface", _vit),
}
