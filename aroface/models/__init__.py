"""Backbones: face crops (B, 3, S, S) to embeddings (B, D)."""

from aroface.config.schema import ModelConfig
from aroface.models.iresnet import IResNet

__all__ = ["IResNet", "build_backbone"]


def build_backbone(config: ModelConfig) -> IResNet:
    """The backbone that `config` describes, freshly initialised from torch's global generator."""
    match config.kind:
        case "iresnet":
            return IResNet(
                config.depth,
                embedding_dim=config.embedding_dim,
                image_size=config.image_size,
                width=config.width,
                dropout=config.dropout,
                checkpoint_activations=config.checkpoint_activations,
            )
