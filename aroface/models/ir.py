"""IR networks of AdaFace and CVLface, with the parameter names of their public weights.

The blocks of IResNet. Two things differ: a block that halves the side without changing the channels takes every second
pixel as its shortcut instead of a projection, and the last batch norm has no scale and no shift. The embedding here is
un-normalised; AdaFace's own code returns it divided by its norm, and the norm.

Source: Kim et al., AdaFace (arXiv:2204.00964); names read from the public models.
"""

import math

from torch import Tensor, nn

from aroface.models.backbone import Backbone
from aroface.models.iresnet import BLOCKS_PER_STAGE, STAGE_CHANNELS, conv3x3
from aroface.models.neck import Fp32BatchNorm1d, Fp32Linear, in_fp32
from aroface.models.norm import forked_norm, norm
from aroface.models.prelu import PReLU
from aroface.models.stem import stem

__all__ = ["IRNet"]

_DOWNSAMPLING = 16  # four stages, each halves the side


class IRBlock(nn.Module):
    """BN - conv - BN - PReLU - conv(stride) - BN, added to the subsampled or projected input."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if channels_in == channels_out:
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            conv3x3(channels_in, channels_out),
            nn.BatchNorm2d(channels_out),
            PReLU(channels_out),
            conv3x3(channels_out, channels_out, stride),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        norm_in, conv1, norm_mid, prelu, conv2, norm_out = self.res_layer
        normed, shortcut = forked_norm(norm_in, x)
        shortcut = _projected(self.shortcut_layer, shortcut)
        out = conv1(normed)
        out = conv2(norm(norm_mid, out, prelu=prelu))
        return norm(norm_out, out, residual=shortcut)


def _projected(shortcut: nn.Module, x: Tensor) -> Tensor:
    if isinstance(shortcut, nn.Sequential):
        project, project_norm = shortcut
        return norm(project_norm, project(x))
    result: Tensor = shortcut(x)
    return result


class IRNet(Backbone):
    """Face crops to embeddings, (B, 3, S, S) -> (B, embedding_dim).

    Args:
        depth: 18, 34, 50 or 101; 101 has the blocks of IResNet-100.
        embedding_dim: D, length of the embedding.
        image_size: side of the square input in pixels, at least 16.
        width: factor on the channels of every stage; 1.0 is the published network.
        dropout: probability in front of the last linear layer, in [0, 1).
        checkpoint_activations: recompute the blocks in the backward pass.

    Raises:
        ShapeError: `image_size` is too small, or an input has another shape.
    """

    def __init__(
        self,
        depth: int,
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        width: float = 1.0,
        dropout: float = 0.4,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            image_size=image_size,
            smallest=_DOWNSAMPLING,
            checkpoint_activations=checkpoint_activations,
        )
        channels = [max(8, round(c * width)) for c in STAGE_CHANNELS]
        blocks = BLOCKS_PER_STAGE[100 if depth == 101 else depth]
        self.input_layer = nn.Sequential(conv3x3(3, channels[0]), nn.BatchNorm2d(channels[0]), PReLU(channels[0]))
        units, before = [], channels[0]
        for channels_out, count in zip(channels, blocks, strict=True):
            units += [
                IRBlock(before, channels_out, 2),
                *(IRBlock(channels_out, channels_out, 1) for _ in range(count - 1)),
            ]
            before = channels_out
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Dropout(dropout),
            nn.Flatten(),
            Fp32Linear(before * math.ceil(image_size / _DOWNSAMPLING) ** 2, embedding_dim),
            Fp32BatchNorm1d(embedding_dim, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim), un-normalised, float32 also under autocast."""
        self._check_images(images)
        conv, first_norm, prelu = self.input_layer
        x = norm(first_norm, stem(conv, images), prelu=prelu)
        for block in self.body:
            x = self._run(block, x)
        neck_norm, dropout, flatten, linear, last_norm = self.output_layer
        # Flattened before the dropout, not after it, so that what it draws does not depend on the memory layout.
        return in_fp32(dropout(flatten(norm(neck_norm, x))), linear, last_norm)
