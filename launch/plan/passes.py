"""Passes that the alignment adds to a training step, as the engine makes them."""

from dataclasses import dataclass

from aroface.config.alignment import AlignmentConfig

__all__ = ["ExtraPasses", "extra_passes"]


@dataclass(frozen=True)
class ExtraPasses:
    """Per image of the batch, on average."""

    gradient: float = 0.0  #: forward through backbone and head, and backward to the image alone
    forward: float = 0.0  #: forward through backbone and head
    backbone: float = 0.0  #: forward through the backbone alone

    @property
    def total(self) -> float:
        """In units of one forward pass; a plain step has 3."""
        return 2 * self.gradient + self.forward + self.backbone


def extra_passes(config: AlignmentConfig) -> ExtraPasses:
    """What the settings cost.

    A sign step is a forward and a data-gradient pass of the attacked share; as the published code runs it, of the whole
    batch. A candidate is a forward pass of the share. The delayed attack reads the gradient that the main pass forms
    anyway. The consistency term embeds the share once more, clean.
    """
    if config.kind == "none":
        return ExtraPasses()
    backbone = config.share if config.consistency_weight > 0 else 0.0
    match config.kind:
        case "adversarial" | "elastic":
            share = 1.0 if config.release_compat else config.share
            return ExtraPasses(gradient=config.steps * share, backbone=backbone)
        case "best_of":
            return ExtraPasses(forward=config.candidates * config.share, backbone=backbone)
        case _:
            return ExtraPasses(backbone=backbone)
