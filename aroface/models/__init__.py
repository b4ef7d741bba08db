"""Backbones: face crops (B, 3, S, S) to embeddings (B, D)."""

from aroface.config.schema import ModelConfig
from aroface.models.backbone import Backbone
from aroface.models.ir import IRNet
from aroface.models.iresnet import IResNet
from aroface.models.mobilefacenet import MobileFaceNet
from aroface.models.vit import VisionTransformer

__all__ = ["Backbone", "IRNet", "IResNet", "MobileFaceNet", "VisionTransformer", "build_backbone"]


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone that `config` describes, freshly initialised from torch's global generator."""
    settings = config.model_dump(exclude={"kind", "init_from"})
    match config.kind:
        case "iresnet":
            return IResNet(**settings)
        case "ir":
            return IRNet(**settings)
        case "mobilefacenet":
            return MobileFaceNet(**settings)
        case "vit":
            return VisionTransformer(**settings)
