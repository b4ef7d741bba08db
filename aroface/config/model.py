"""Settings of the backbones."""

from typing import Literal

from pydantic import Field

from aroface.config.section import Section

__all__ = [
    "IResNetConfig",
    "ModelConfig",
]


class IResNetConfig(Section):
    """The improved residual network of ArcFace."""

    kind: Literal["iresnet"]
    depth: Literal[18, 34, 50, 100, 200] = Field(description="network depth; 100 is R100")
    embedding_dim: int = Field(512, ge=8, le=4096, description="length of the embedding")
    image_size: int = Field(112, ge=16, le=448, description="side of the input, pixels; faces are resized to it")
    width: float = Field(
        1.0, gt=0, le=4, description="factor on the channels of every stage; 1 is the published network"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability in front of the last linear layer")
    checkpoint_activations: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, 1/3 more work"
    )


ModelConfig = IResNetConfig
