"""Names and shapes of the public face networks, written down from theirs and not from our modules.

Each function gives `name -> shape` in the order of the forward pass. `random_state` fills them, so that a file in the
layout of another project can be made without its code.
"""

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


def _bn(name: str, channels: int, *, affine: bool = True) -> Shapes:
    learned = {f"{name}.weight": (channels,), f"{name}.bias": (channels,)} if affine else {}
    statistics = {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
    return {**learned, **statistics, f"{name}.num_batches_tracked": ()}


def iresnet(depth: int, *, width: int = 64, dim: int = 512, side: int = 7) -> Shapes:
    """`iresnet*` of InsightFace arcface_torch; also CVLface's `iresnet_insightface` behind `net.`."""
    shapes: Shapes = {"conv1.weight": (width, 3, 3, 3), **_bn("bn1", width), "prelu.weight": (width,)}
    before = width
    for stage, blocks in enumerate(RESNET_BLOCKS[depth], start=1):
        after = width * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes |= _bn(f"{name}.bn1", before)
            shapes[f"{name}.conv1.weight"] = (after, before, 3, 3)
            shapes |= _bn(f"{name}.bn2", after)
            shapes[f"{name}.prelu.weight"] = (after,)
            shapes[f"{name}.conv2.weight"] = (after, after, 3, 3)
            shapes |= _bn(f"{name}.bn3", after)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (after, before, 1, 1)
                shapes |= _bn(f"{name}.downsample.1", after)
            before = after
    shapes |= _bn("bn2", before)
    shapes |= {"fc.weight": (dim, before * side * side), "fc.bias": (dim,)}
    return shapes | _bn("features", dim)


def ir(depth: int, *, width: int = 64, dim: int = 512, side: int = 7, squeeze: bool = False) -> Shapes:
    """`IR_*` of AdaFace (behind `model.`) and CVLface (behind `net.`); with `squeeze` IR_SE, which we lack."""
    shapes: Shapes = {"input_layer.0.weight": (width, 3, 3, 3), **_bn("input_layer.1", width)}
    shapes["input_layer.2.weight"] = (width,)
    before, index = width, 0
    for stage, blocks in enumerate(RESNET_BLOCKS[100 if depth == 101 else depth]):
        after = width * 2**stage
        for _ in range(blocks):
            name = f"body.{index}"
            if before != after:
                shapes[f"{name}.shortcut_layer.0.weight"] = (after, before, 1, 1)
                shapes |= _bn(f"{name}.shortcut_layer.1", after)
            shapes |= _bn(f"{name}.res_layer.0", before)
            shapes[f"{name}.res_layer.1.weight"] = (after, before, 3, 3)
            shapes |= _bn(f"{name}.res_layer.2", after)
            shapes[f"{name}.res_layer.3.weight"] = (after,)
            shapes[f"{name}.res_layer.4.weight"] = (after, after, 3, 3)
            shapes |= _bn(f"{name}.res_layer.5", after)
            if squeeze:
                shapes[f"{name}.res_layer.se_block.fc1.weight"] = (after // 16, after, 1, 1)
                shapes[f"{name}.res_layer.se_block.fc2.weight"] = (after, after // 16, 1, 1)
            before, index = after, index + 1
    shapes |= _bn("output_layer.0", before)
    shapes |= {"output_layer.3.weight": (dim, before * side * side), "output_layer.3.bias": (dim,)}
    return shapes | _bn("output_layer.4", dim, affine=False)


def _unit(name: str, channels_in: int, channels_out: int, kernel: int, groups: int, *, prelu: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.layers.0.weight": (channels_out, channels_in // groups, kernel, kernel)}
    shapes |= _bn(f"{name}.layers.1", channels_out)
    if prelu:
        shapes[f"{name}.layers.2.weight"] = (channels_out,)
    return shapes


def _inverted(name: str, channels_in: int, channels_out: int, hidden: int) -> Shapes:
    return (
        _unit(f"{name}.layers.0", channels_in, hidden, 1, 1)
        | _unit(f"{name}.layers.1", hidden, hidden, 3, hidden)
        | _unit(f"{name}.layers.2", hidden, channels_out, 1, 1, prelu=False)
    )


def mobilefacenet(*, large: bool = False, dim: int = 512, side: int = 7) -> Shapes:
    """`mbf` and `mbf_large` of arcface_torch."""
    blocks, low, high = ((2, 8, 12, 4), 256, 512) if large else ((1, 4, 6, 2), 128, 256)
    groups = [(blocks[0], low, 128), (blocks[1], low, 128), (blocks[2], high, 256), (blocks[3], high, 256)]
    shapes = _unit("layers.0", 3, low, 3, 1)
    for place, (count, channels, hidden) in zip((1, 3, 5, 7), groups, strict=True):
        if place == 1 and count == 1:
            shapes |= _unit("layers.1", low, low, 3, 64)
            continue
        for index in range(count):
            shapes |= _inverted(f"layers.{place}.layers.{index}", channels, channels, hidden)
    shapes |= _inverted("layers.2", low, low, 128)
    shapes |= _inverted("layers.4", low, high, 256)
    shapes |= _inverted("layers.6", high, high, 512)
    shapes |= _unit("conv_sep", high, 512, 1, 1)
    shapes |= _unit("features.layers.0", 512, 512, side, 512, prelu=False)
    shapes["features.layers.2.weight"] = (dim, 512)
    return shapes | _bn("features.layers.3", dim)


def vit(width: int, depth: int, *, patch: int = 9, size: int = 112, mlp: float = 4.0, dim: int = 512) -> Shapes:
    """`vit_*` of arcface_torch; CVLface has it behind `net.` and without `mask_token` where nothing is masked."""
    patches = (size // patch) ** 2
    shapes: Shapes = {"pos_embed": (1, patches, width), "mask_token": (1, 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    hidden = int(width * mlp)
    for index in range(depth):
        name = f"blocks.{index}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
        shapes[f"{name}.attn.qkv.weight"] = (3 * width, width)
        shapes |= {f"{name}.attn.proj.weight": (width, width), f"{name}.attn.proj.bias": (width,)}
        shapes |= {f"{name}.mlp.fc1.weight": (hidden, width), f"{name}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"{name}.mlp.fc2.weight": (width, hidden), f"{name}.mlp.fc2.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "feature.0.weight": (width, width * patches)}
    shapes |= _bn("feature.1", width)
    shapes["feature.2.weight"] = (dim, width)
    return shapes | _bn("feature.3", dim)


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of these shapes that keep the activations of a deep network in range, statistics included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("running_mean") or name.endswith("bias"):
            state[name] = 0.1 * torch.randn(shape, generator=generator)
        elif len(shape) < 2:
            state[name] = torch.rand(shape, generator=generator) * 0.4 + 0.3  # scales of norms, slopes of PReLU
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return state


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with a prefix in front of every name."""
    return {f"{prefix}{name}": value for name, value in state.items()}
