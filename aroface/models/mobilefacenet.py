"""MobileFaceNet as arcface_torch builds it (`mbf`, `mbf_large`), with the parameter names of its public weights.

Inverted residuals with PReLU; a depthwise convolution over the whole last feature map takes the place of pooling.

Source: Chen et al., MobileFaceNets (arXiv:1804.07573); sizes and names read from the public models.
"""

import math

from torch import Tensor, nn

from aroface.models.backbone import Backbone
from aroface.models.neck import Fp32BatchNorm1d, Fp32Linear, in_fp32
from aroface.models.norm import norm
from aroface.models.prelu import PReLU

__all__ = ["MBF_SIZES", "MobileFaceNet"]

#: Blocks of the four groups, and the factor on the channels, by size.
MBF_SIZES: dict[str, tuple[tuple[int, int, int, int], int]] = {"base": ((1, 4, 6, 2), 2), "large": ((2, 8, 12, 4), 4)}

_DOWNSAMPLING = 16
_LAST_CHANNELS = 512


class ConvUnit(nn.Module):
    """conv - BN, and PReLU unless `activation` is false."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(channels_out)]
        if activation:
            layers.append(PReLU(channels_out))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, batch_norm, *prelu = self.layers
        return norm(batch_norm, conv(x), prelu=prelu[0] if prelu else None, residual=residual)


class Bottleneck(nn.Module):
    """1 x 1 to `hidden` channels, depthwise 3 x 3, 1 x 1 without activation; added to the input if `residual`."""

    def __init__(self, channels_in: int, channels_out: int, hidden: int, *, stride: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvUnit(channels_in, hidden),
            ConvUnit(hidden, hidden, 3, stride=stride, padding=1, groups=hidden),
            ConvUnit(hidden, channels_out, activation=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self.layers
        result: Tensor = project(depthwise(expand(x)), x if self.residual else None)
        return result


class Residuals(nn.Module):
    """`count` bottlenecks that keep size and channels."""

    def __init__(self, channels: int, hidden: int, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(Bottleneck(channels, channels, hidden, stride=1, residual=True) for _ in range(count))
        )


class GlobalDepthwise(nn.Module):
    """The neck: one weight per pixel and channel, then a linear layer and a batch norm."""

    def __init__(self, side: int, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvUnit(_LAST_CHANNELS, _LAST_CHANNELS, side, groups=_LAST_CHANNELS, activation=False),
            nn.Flatten(),
            Fp32Linear(_LAST_CHANNELS, embedding_dim, bias=False),
            Fp32BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        unit, flatten, linear, last_norm = self.layers
        return in_fp32(flatten(unit(x)), linear, last_norm)


class MobileFaceNet(Backbone):
    """Face crops to embeddings, (B, 3, S, S) -> (B, embedding_dim).

    Args:
        size: one of `MBF_SIZES`.
        embedding_dim: D, length of the embedding.
        image_size: side of the square input in pixels, at least 16.
        checkpoint_activations: recompute the blocks in the backward pass.

    Raises:
        ShapeError: `image_size` is too small, or an input has another shape.
    """

    def __init__(
        self, size: str, *, embedding_dim: int = 512, image_size: int = 112, checkpoint_activations: bool = False
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            image_size=image_size,
            smallest=_DOWNSAMPLING,
            checkpoint_activations=checkpoint_activations,
        )
        blocks, scale = MBF_SIZES[size]
        low, high = 64 * scale, 128 * scale
        first = (
            ConvUnit(low, low, 3, padding=1, groups=64) if blocks[0] == 1 else Residuals(low, 128, blocks[0])
        )  # the published networks do not scale the widths of the depthwise layers
        self.layers = nn.ModuleList(
            [
                ConvUnit(3, low, 3, stride=2, padding=1),
                first,
                Bottleneck(low, low, 128, stride=2, residual=False),
                Residuals(low, 128, blocks[1]),
                Bottleneck(low, high, 256, stride=2, residual=False),
                Residuals(high, 256, blocks[2]),
                Bottleneck(high, high, 512, stride=2, residual=False),
                Residuals(high, 256, blocks[3]),
            ]
        )
        self.conv_sep = ConvUnit(high, _LAST_CHANNELS)
        self.features = GlobalDepthwise(math.ceil(image_size / _DOWNSAMPLING), embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim), un-normalised, float32 also under autocast."""
        self._check_images(images)
        x = images
        for layer in self.layers:
            for block in layer.layers if isinstance(layer, Residuals) else [layer]:
                x = self._run(block, x)
        embeddings: Tensor = self.features(self.conv_sep(x))
        return embeddings
