"""Vision transformers for faces, with the parameter names of the public weights of arcface_torch and CVLface.

There is no class token: the tokens of all patches, side by side, are projected to the embedding. ReLU6 in the MLP. In
training a share of the patches is left out; behind the blocks a learned token stands in their places.

Source: An et al., Killing Two Birds with One Stone (arXiv:2203.15565), whose code defines the T, S, B and L of
the field; masking after He et al. (arXiv:2111.06377); stochastic depth after Huang et al. (arXiv:1603.09382).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aroface.errors import ConfigError
from aroface.models.backbone import Backbone
from aroface.models.neck import Fp32BatchNorm1d, Fp32Linear, in_fp32

__all__ = ["VisionTransformer"]

_INIT_STD = 0.02
_NECK_BN_EPS = 2e-5


class DropPath(nn.Dropout):
    """Drops a branch for some images and scales it for the others; found by what switches off `nn.Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        kept = torch.rand(len(input), *[1] * (input.dim() - 1), device=input.device) >= self.p
        return input * kept.to(input.dtype) / (1 - self.p)


class PatchChoice(nn.Dropout):
    """Which patches of each image a training pass sees; `p` is the share it does not."""

    def forward(self, input: Tensor) -> Tensor:
        """Places (B, kept) of the patches that stay, from tokens (B, N, C); all N outside of training."""
        batch, patches = input.shape[:2]
        order = torch.rand(batch, patches, device=input.device).argsort(dim=1)
        return order[:, : max(1, int(patches * (1 - self.p)))]

    @property
    def is_active(self) -> bool:
        """Whether it leaves out anything now."""
        return self.training and self.p > 0


class Attention(nn.Module):
    """Multi-head self-attention over the patches, no bias in the projections of query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        qkv = self.qkv(x).reshape(batch, patches, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*qkv.unbind(0))
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, patches, width))
        return result


class Mlp(nn.Module):
    """linear - ReLU6 - linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        result: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return result


class PatchEmbedding(nn.Module):
    """Non-overlapping patches to tokens; pixels beyond the last whole patch are not seen (4 px of 112 at patch 9)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class VisionTransformer(Backbone):
    """Face crops to embeddings, (B, 3, S, S) -> (B, embedding_dim).

    Args:
        width: length of a token.
        depth: number of blocks.
        heads: attention heads; divides `width`.
        patch: side of a patch, pixels.
        mlp_ratio: hidden width of the MLP / width.
        drop_path: probability that training skips the last block; grows linearly from 0 at the first.
        mask_ratio: share of the patches that training leaves out.
        embedding_dim: D, length of the embedding.
        image_size: side of the square input in pixels, at least `patch`.
        checkpoint_activations: recompute the blocks in the backward pass.

    Raises:
        ConfigError: `heads` does not divide `width`.
        ShapeError: `image_size` is too small, or an input has another shape.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int = 8,
        patch: int = 9,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mask_ratio: float = 0.0,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            image_size=image_size,
            smallest=patch,
            checkpoint_activations=checkpoint_activations,
        )
        if width % heads:
            raise ConfigError(f"model.heads = {heads} does not divide model.width = {width}; choose a divisor.")
        patches = (image_size // patch) ** 2
        self.patch_embed = PatchEmbedding(patch, width)
        self.pos_embed = nn.Parameter(torch.empty(1, patches, width))
        # It exists without masking too, as in the public weights; it is trained only where it is used.
        self.mask_token = nn.Parameter(torch.empty(1, 1, width), requires_grad=mask_ratio > 0)
        self.patch_choice = PatchChoice(mask_ratio)
        rates = [drop_path * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, int(width * mlp_ratio), rate) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            Fp32Linear(width * patches, width, bias=False),
            Fp32BatchNorm1d(width, eps=_NECK_BN_EPS),
            Fp32Linear(width, embedding_dim, bias=False),
            Fp32BatchNorm1d(embedding_dim, eps=_NECK_BN_EPS),
        )
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.mask_token, std=_INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim), un-normalised, float32 also under autocast."""
        self._check_images(images)
        x = self.patch_embed(images) + self.pos_embed
        places = self.patch_choice(x)[:, :, None] if self.patch_choice.is_active else None
        if places is not None:
            x = x.gather(1, places.expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = self._run(block, x)
        x = self.norm(x)
        if places is not None:
            empty = self.mask_token.to(x.dtype).expand(len(x), self.pos_embed.shape[1], -1)
            x = empty.scatter(1, places.expand_as(x), x)
        return in_fp32(x.flatten(1), *self.feature)
