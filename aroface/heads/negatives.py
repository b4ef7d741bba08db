"""What some heads make of the cosines of the other classes: value and slope, one chunk of classes at a time.

Legend: N rows of the global batch, K classes of a chunk.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CurricularNegatives", "FilteredNegatives", "NegativeRule"]


class NegativeRule(Protocol):
    """phi(cos) of every row and class of a chunk."""

    @property
    def largest(self) -> float:
        """Upper bound of phi."""
        ...

    def __call__(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) cosines to (N, K) phi and (N, K) d phi / d cos."""
        ...


@dataclass(frozen=True)
class CurricularNegatives:
    """cos (t + cos) for negatives that are nearer than the target with its margin, cos for all others.

    Which negatives are hard is not differentiated, and neither is t. Source: CurricularFace, arXiv:2004.00288.
    """

    thresholds: Tensor  #: (N,) cos(theta_target + m) of every row
    t: Tensor  #: scalar, the running mean of the target cosines

    largest = 2.0

    def __call__(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """See `NegativeRule`."""
        hard = cosines > self.thresholds[:, None]
        values = torch.where(hard, cosines * (self.t + cosines), cosines)
        return values, torch.where(hard, self.t + 2 * cosines, 1.0)


@dataclass(frozen=True)
class FilteredNegatives:
    """0, without a gradient, for negatives above a threshold: likely the same person under another label.

    They stay in the softmax with the logit 0. Source: the interclass filtering of arcface_torch's combined margin.
    """

    threshold: float

    largest = 1.0

    def __call__(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """See `NegativeRule`."""
        kept = (cosines <= self.threshold).to(cosines.dtype)
        return cosines * kept, kept
