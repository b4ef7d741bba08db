"""The method: find the small misalignment that hurts an image most, and train on it (ARoFace, arXiv:2407.14972)."""

from aroface.alignment.attack import find_worst
from aroface.alignment.bounds import project
from aroface.alignment.realign import Realigned, frozen_statistics, realign
from aroface.alignment.warp import Alignment, identity_alignment, landmark_displacement_px, warp

__all__ = [
    "Alignment",
    "Realigned",
    "find_worst",
    "frozen_statistics",
    "identity_alignment",
    "landmark_displacement_px",
    "project",
    "realign",
    "warp",
]
