"""Settings of the backbones."""

from typing import Annotated, Literal

from pydantic import Field

from aroface.config.section import Section

__all__ = [
    "IRConfig",
    "IResNetConfig",
    "MobileFaceNetConfig",
    "ModelConfig",
    "ModelSection",
    "VIT_SIZES",
    "ViTConfig",
]

#: (width, depth) of the vision transformers for faces, all with 8 heads, patches of 9 px and mlp_ratio 4.
VIT_SIZES: dict[str, tuple[int, int]] = {"t": (256, 12), "s": (512, 12), "b": (512, 24), "l": (768, 24)}


class _Backbone(Section):
    embedding_dim: int = Field(512, ge=8, le=4096, description="length of the embedding")
    image_size: int = Field(112, ge=16, le=448, description="side of the input, pixels; faces are resized to it")
    checkpoint_activations: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, 1/3 more work"
    )
    init_from: str | None = Field(
        None, description="run or checkpoint whose weights a new run starts from; null: random weights"
    )


class _Residual(_Backbone):
    width: float = Field(
        1.0, gt=0, le=4, description="factor on the channels of every stage; 1 is the published network"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability in front of the last linear layer")


def _with_width(name: str, width: float) -> str:
    return name if width == 1 else f"{name}-w{width:g}"


class IResNetConfig(_Residual):
    """The improved residual network of ArcFace, as arcface_torch and the ARoFace release build it."""

    kind: Literal["iresnet"]
    depth: Literal[18, 34, 50, 100, 200] = Field(description="network depth; 100 is R100")

    @property
    def name(self) -> str:
        """Such as `iresnet100`."""
        return _with_width(f"iresnet{self.depth}", self.width)


class IRConfig(_Residual):
    """The same network as AdaFace and CVLface build it: no projection in stage 1, no scale on the embedding."""

    kind: Literal["ir"]
    depth: Literal[18, 34, 50, 101] = Field(description="network depth; 101 has the blocks of iresnet100")
    dropout: float = Field(0.4, ge=0, lt=1, description="probability in front of the last linear layer")

    @property
    def name(self) -> str:
        """Such as `ir101`."""
        return _with_width(f"ir{self.depth}", self.width)


class MobileFaceNetConfig(_Backbone):
    """MobileFaceNet of arcface_torch: `mbf` and `mbf_large`."""

    kind: Literal["mobilefacenet"]
    size: Literal["base", "large"] = Field(description="base: 2 M parameters; large: twice the blocks, twice the width")

    @property
    def name(self) -> str:
        """`mobilefacenet` or `mobilefacenet-large`."""
        return "mobilefacenet" if self.size == "base" else f"mobilefacenet-{self.size}"


class ViTConfig(_Backbone):
    """Vision transformer for faces: every patch token goes into the embedding, there is no class token."""

    kind: Literal["vit"]
    width: int = Field(ge=8, le=4096, description="length of a token: 256 (T), 512 (S, B), 768 (L)")
    depth: int = Field(ge=1, le=64, description="blocks: 12 (T, S), 24 (B, L)")
    heads: int = Field(8, ge=1, le=64, description="attention heads; divides width")
    patch: int = Field(9, ge=2, le=64, description="side of a patch, pixels")
    mlp_ratio: float = Field(4.0, gt=0, le=16, description="hidden width of the MLP / width")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="probability that the last block is skipped; grows with depth"
    )
    mask_ratio: float = Field(0.1, ge=0, lt=1, description="share of the patches that training leaves out")

    @property
    def name(self) -> str:
        """`vit-b` and its like; sizes without a name say width and depth."""
        if (self.heads, self.patch, self.mlp_ratio) == (8, 9, 4):
            for letter, shape in VIT_SIZES.items():
                if shape == (self.width, self.depth):
                    return f"vit-{letter}"
        return f"vit-{self.width}x{self.depth}-h{self.heads}-p{self.patch}"


ModelConfig = Annotated[IResNetConfig | IRConfig | MobileFaceNetConfig | ViTConfig, Field(discriminator="kind")]


class ModelSection(Section):
    """The backbone of weights that came without a training run."""

    model: ModelConfig
