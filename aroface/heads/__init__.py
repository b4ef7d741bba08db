"""Margin softmax heads on classes that are shared out over ranks; one rank is the trivial case."""

from aroface.heads.class_sharded import Reduction, ShardedHead, build_head, class_range
from aroface.heads.margins import ada_margin, arc_margin, combined_margin, cos_margin
from aroface.heads.sgd import HeadSGD

__all__ = [
    "HeadSGD",
    "Reduction",
    "ShardedHead",
    "ada_margin",
    "arc_margin",
    "build_head",
    "class_range",
    "combined_margin",
    "cos_margin",
]
