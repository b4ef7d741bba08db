"""The ways in which FAE-1 lets an alignment go wrong, and the one warp from the source image that each amounts to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from aroface.align import similarity_to_template
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ConfigError, DataError
from aroface.types import FaceSet
from retrieval.degrade import CROP_PX, Misalignment, generator_for, jitter_landmarks, misalign, sample_misalignment

__all__ = ["SWEEPS", "TASK", "Side", "Sides", "Sweep", "WarpedFaces", "drawn_error", "points_in_crop"]

TASK = "fae-1"
#: probe: the other side stays aligned. both: every image is misaligned by its own draw.
Sides = Literal["probe", "both"]
Side = Literal["probe", "reference"]

_Points = NDArray[np.float64]


@dataclass(frozen=True)
class Sweep:
    """One way to go wrong, by how much."""

    name: str
    unit: str
    levels: tuple[float, ...]
    clean_level: float  #: the level at which nothing happens
    is_random: bool  #: whether trials differ
    draw: Callable[[np.random.Generator, float, _Points], Misalignment]  #: from a level and the points in the crop


def _shift(generator: np.random.Generator, length_px: float, _: _Points) -> Misalignment:
    direction = generator.uniform(0.0, 2.0 * np.pi)
    return Misalignment(shift_px=(length_px * float(np.cos(direction)), length_px * float(np.sin(direction))))


SWEEPS: tuple[Sweep, ...] = (
    Sweep(
        *("angle", "deg", (-20, -15, -10, -5, -2, 0, 2, 5, 10, 15, 20), 0, False),
        lambda _, a, __: Misalignment(theta_deg=a),
    ),
    Sweep("shift", "px", (0, 1, 2, 4, 6, 8, 12), 0, True, _shift),
    Sweep(
        *("scale", "", (0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2), 1, False),
        lambda _, s, __: Misalignment(scale=s),
    ),
    Sweep("severity", "", (0, 0.25, 0.5, 0.75, 1), 0, True, lambda g, level, _: sample_misalignment(g, level)),
    Sweep(
        *("landmarks", "eye distances", (0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.10, 0.15), 0, True),
        jitter_landmarks,
    ),
)


def drawn_error(
    sweep: Sweep, level: float, *, data_set: str, key: str, trial: int, side: Side = "probe", points: _Points
) -> Misalignment:
    """The error of one image: a function of set, key, trial and side alone.

    The same direction is drawn at every level of a sweep, so that levels differ in size. A reference takes the angle
    or the scale of the level or its opposite, as its draw decides: both sides turned alike would hide the error.
    """
    generator = generator_for(f"{TASK}/{data_set}/{sweep.name}/{side}", key, trial)
    if side == "reference" and not sweep.is_random and generator.random() < 0.5:
        level = 2 * sweep.clean_level - level
    return sweep.draw(generator, level, points)


def points_in_crop(landmarks: NDArray[np.float32] | None) -> _Points:
    """(5, 2) where the landmarks of an image lie after its alignment; those of the template where there are none."""
    if landmarks is None:
        return np.asarray(ARCFACE_TEMPLATE_112, np.float64)
    matrix = similarity_to_template(landmarks)
    moved: _Points = landmarks.reshape(5, 2).astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return moved


class WarpedFaces:
    """Images of a set with an error of their alignment, each resampled once from its source.

    Args:
        faces: the sources: crops that are aligned already, or images of any size with landmarks.
        keys: (N,) names, for messages and draws.
        places: (N,) index into `faces`; -1 is an image that is missing.
        landmarks: (N, 10) pixels of the source; None: the sources are aligned crops.
        errors: (N,) what goes wrong.
    """

    def __init__(
        self,
        faces: FaceSet,
        keys: Sequence[str],
        places: Sequence[int],
        landmarks: NDArray[np.float32] | None,
        errors: Sequence[Misalignment],
    ) -> None:
        self._faces, self._places, self._landmarks, self._errors = faces, places, landmarks, errors
        self.keys = keys
        self.identities: Sequence[str] = [""] * len(keys)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Pixels of one image."""
        if self._places[index] < 0:
            raise DataError(f"{self.keys[index]} is not among the images.")
        pixels, error = self._faces.read(self._places[index]), self._errors[index]
        if self._landmarks is None:
            if pixels.shape[0] != pixels.shape[1]:
                raise ConfigError(  # not DataError: that would make a failure to enrol of a wrong set
                    f"{self.keys[index]} is {pixels.shape[1]} x {pixels.shape[0]} pixels; aligned faces are square. "
                    "Align the set first."
                )
            return misalign(pixels, error)
        aligned = np.vstack([similarity_to_template(self._landmarks[index]), [0, 0, 1]])
        matrix = error.matrix() @ aligned
        return np.asarray(cv2.warpAffine(pixels, matrix, (CROP_PX, CROP_PX), flags=cv2.INTER_LINEAR), np.uint8)
