"""The method: find the small misalignment that hurts an image most, and train on it (ARoFace, arXiv:2407.14972)."""

from aroface.alignment.attack import find_worst, worst_of_corners
from aroface.alignment.bounds import project
from aroface.alignment.delayed import DelayedAttack, alignment_gradient
from aroface.alignment.realign import Attacked, Realigned, attack_images, frozen_statistics, realign
from aroface.alignment.release import draw_release, release_counts, release_mix
from aroface.alignment.warp import Alignment, identity_alignment, landmark_displacement_px, warp

__all__ = [
    "Alignment",
    "Attacked",
    "DelayedAttack",
    "Realigned",
    "alignment_gradient",
    "attack_images",
    "draw_release",
    "find_worst",
    "frozen_statistics",
    "identity_alignment",
    "landmark_displacement_px",
    "project",
    "realign",
    "release_counts",
    "release_mix",
    "warp",
    "worst_of_corners",
]
