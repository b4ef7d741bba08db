"""IResNet: the improved residual network of ArcFace, with the parameter names of its public weights.

Pre-activation batch norm in front of the first convolution, PReLU, stride in the second convolution, and a
BatchNorm - Dropout - Linear - BatchNorm neck. `state_dict()` of depths 18 to 200 at `width=1` and 112 px has the
names and shapes of the InsightFace `iresnet*` models, so their checkpoints load without a mapping.

Source: Deng et al., ArcFace (arXiv:1801.07698), Sec. 3.1; Duta et al., iResNet (arXiv:2004.04989).
"""

import math

import torch
from torch import Tensor, nn

from aroface.models.backbone import Backbone
from aroface.models.neck import Fp32BatchNorm1d, Fp32Linear, in_fp32
from aroface.models.norm import forked_norm, norm
from aroface.models.prelu import PReLU
from aroface.models.stem import stem

__all__ = ["BLOCKS_PER_STAGE", "IResNet", "STAGE_CHANNELS", "conv3x3"]

#: Residual blocks in each of the four stages, by depth.
BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}

#: Channels of the four stages at width 1.
STAGE_CHANNELS = (64, 128, 256, 512)
_BN_EPS = 1e-5
_DOWNSAMPLING = 16  # four stages, each halves the side


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3 convolution with padding and without bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class IBasicBlock(nn.Module):
    """BN - conv - BN - PReLU - conv(stride) - BN, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in, eps=_BN_EPS)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out, eps=_BN_EPS)
        self.prelu = PReLU(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out, stride)
        self.bn3 = nn.BatchNorm2d(channels_out, eps=_BN_EPS)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out, eps=_BN_EPS),
            )

    def forward(self, x: Tensor) -> Tensor:
        normed, identity = forked_norm(self.bn1, x)
        if self.downsample is not None:
            project, project_norm = self.downsample
            identity = norm(project_norm, project(identity))
        out = self.conv1(normed)
        out = self.conv2(norm(self.bn2, out, prelu=self.prelu))
        return norm(self.bn3, out, residual=identity)


class IResNet(Backbone):
    """Face crops to embeddings, (B, 3, S, S) -> (B, embedding_dim).

    Args:
        depth: one of `BLOCKS_PER_STAGE`.
        embedding_dim: D, length of the embedding.
        image_size: side of the square input in pixels, at least 16 (each stage halves it, rounding up).
        width: factor on the channels of every stage; 1.0 is the published network.
        dropout: probability in front of the last linear layer, in [0, 1).
        checkpoint_activations: recompute the blocks of each stage in the backward pass (about a fifth of the
            activation memory for a third more arithmetic).

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
        dropout: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            image_size=image_size,
            smallest=_DOWNSAMPLING,
            checkpoint_activations=checkpoint_activations,
        )
        channels = [max(8, round(c * width)) for c in STAGE_CHANNELS]
        blocks = BLOCKS_PER_STAGE[depth]
        self.conv1 = conv3x3(3, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0], eps=_BN_EPS)
        self.prelu = PReLU(channels[0])
        self.layer1 = self._stage(channels[0], channels[0], blocks[0])
        self.layer2 = self._stage(channels[0], channels[1], blocks[1])
        self.layer3 = self._stage(channels[1], channels[2], blocks[2])
        self.layer4 = self._stage(channels[2], channels[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(channels[3], eps=_BN_EPS)
        self.dropout = nn.Dropout(dropout)
        self.fc = Fp32Linear(channels[3] * math.ceil(image_size / _DOWNSAMPLING) ** 2, embedding_dim)
        self.features = Fp32BatchNorm1d(embedding_dim, eps=_BN_EPS)
        self._initialise()

    @staticmethod
    def _stage(channels_in: int, channels_out: int, num_blocks: int) -> nn.Sequential:
        first = IBasicBlock(channels_in, channels_out, stride=2)
        return nn.Sequential(first, *(IBasicBlock(channels_out, channels_out, 1) for _ in range(num_blocks - 1)))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.1)
        # The scale of the last batch norm is fixed: the head normalises the embedding, and a free scale per
        # dimension would only fight the weight decay.
        nn.init.ones_(self.features.weight)
        self.features.weight.requires_grad = False

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim), float32 also under autocast."""
        self._check_images(images)
        x = norm(self.bn1, stem(self.conv1, images), prelu=self.prelu)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self._run(block, x)
        x = self.dropout(torch.flatten(norm(self.bn2, x), 1))
        return in_fp32(x, self.fc, self.features)
