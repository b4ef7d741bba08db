"""Degraded faces: alignment errors and low resolution, drawn from the name of the image.

Every draw is a function of (task, image key, trial): the same picture meets the same error whatever the model, the
order or the number of threads. The geometry is that of the FAE-1 family of the evaluation protocols: in pixels of the
112-px crop, x right and y down, a point x of the aligned face moves to `s R(theta) (x - c) + c + t`, c = (55.5, 55.5).
"""

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.align import similarity_to_template
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ConfigError
from aroface.images import decode_rgb, encode_jpeg, resize_face

__all__ = [
    "ALIGNED",
    "CROP_PX",
    "INTER_OCULAR_PX",
    "Misalignment",
    "draw_jpeg_quality",
    "generator_for",
    "jitter_landmarks",
    "low_quality",
    "misalign",
    "move_points",
    "nme",
    "sample_misalignment",
]

CROP_PX = 112
#: Distance of the eyes of the template, the unit of the normalised mean error (NME).
INTER_OCULAR_PX = float(np.linalg.norm(ARCFACE_TEMPLATE_112[1] - ARCFACE_TEMPLATE_112[0]))

_BOX_THETA_DEG, _BOX_SHIFT_PX, _BOX_SCALE = 15.0, 8.0, 0.20
_JPEG_QUALITY = (40, 80)


@dataclass(frozen=True)
class Misalignment:
    """A similarity in the 112-px frame; what an aligner's error does to the face."""

    theta_deg: float = 0.0  #: positive turns clockwise on the screen (y points down)
    scale: float = 1.0  #: above 1 enlarges the face
    shift_px: tuple[float, float] = (0.0, 0.0)  #: x right, y down

    def matrix(self, size_px: int = CROP_PX) -> NDArray[np.float64]:
        """(2, 3) map from points of the aligned crop to points of the misaligned one, for crops of `size_px`."""
        theta = np.deg2rad(self.theta_deg)
        turn = self.scale * np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        centre = np.full(2, (size_px - 1) / 2)
        shift = np.asarray(self.shift_px) * (size_px / CROP_PX)
        return np.column_stack([turn, centre - turn @ centre + shift])


#: No error; `misalign` returns the image as it is.
ALIGNED = Misalignment()


def generator_for(task: str, key: str, trial: int = 0) -> np.random.Generator:
    """Random numbers that belong to one image of one task; equal on every machine."""
    digest = hashlib.sha256(f"{task}\0{key}\0{trial}".encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def sample_misalignment(generator: np.random.Generator, severity: float) -> Misalignment:
    """Uniform in the box of 15 degrees, 8 px in each direction and 20 % of scale, all multiplied by `severity`.

    Raises:
        ConfigError: `severity` is outside 0..1.
    """
    if not 0.0 <= severity <= 1.0:
        raise ConfigError(f"severity = {severity} is outside [0, 1]; 0 is aligned, 1 the whole box.")
    theta, scale, x, y = severity * generator.uniform(-1.0, 1.0, 4)
    return Misalignment(_BOX_THETA_DEG * theta, 1.0 + _BOX_SCALE * scale, (_BOX_SHIFT_PX * x, _BOX_SHIFT_PX * y))


def jitter_landmarks(
    generator: np.random.Generator, sigma: float, points: ArrayLike = ARCFACE_TEMPLATE_112
) -> Misalignment:
    """What an aligner does when each of the five landmarks is wrong by a normal error of `sigma` eye distances.

    The crop is aligned anew from the wrong landmarks, by the least-squares similarity that alignment always uses.

    Args:
        generator: of the errors.
        sigma: standard deviation in each direction, in eye distances of the template.
        points: (5, 2) where the right landmarks lie in the aligned crop.
    """
    found = np.asarray(points, np.float64) + sigma * INTER_OCULAR_PX * generator.standard_normal((5, 2))
    matrix = similarity_to_template(found)
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    centre = np.full(2, (CROP_PX - 1) / 2)
    shift = matrix[:, :2] @ centre + matrix[:, 2] - centre
    theta = float(np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0])))
    return Misalignment(theta, scale, (float(shift[0]), float(shift[1])))


def misalign(pixels: NDArray[np.uint8], error: Misalignment) -> NDArray[np.uint8]:
    """Warp a square (S, S, 3) crop once, bilinearly; outside the crop the image is black (0).

    Shifts are in pixels of a 112-px crop and grow with S.
    """
    if error == ALIGNED:
        return pixels
    size = pixels.shape[0]
    warped = cv2.warpAffine(
        pixels,
        error.matrix(size),
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(0.0, 0.0, 0.0),
    )
    return np.asarray(warped, np.uint8)


def move_points(points: ArrayLike, error: Misalignment) -> NDArray[np.float64]:
    """Where (..., 2) points of the aligned 112-px crop lie after the error."""
    matrix = error.matrix()
    moved: NDArray[np.float64] = np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return moved


def nme(error: Misalignment, points: ArrayLike = ARCFACE_TEMPLATE_112) -> float:
    """Mean distance that the five landmarks (those of the template) move, over the distance of the template's eyes."""
    distances = np.linalg.norm(move_points(points, error) - np.asarray(points), axis=1)
    return float(distances.mean() / INTER_OCULAR_PX)


def low_quality(pixels: NDArray[np.uint8], *, size_px: int, jpeg_quality: int) -> NDArray[np.uint8]:
    """Shrink a square crop by area to `size_px`, pass it through JPEG, and enlarge it bilinearly to 112 px."""
    small = resize_face(pixels, size_px)
    return resize_face(decode_rgb(encode_jpeg(small, quality=jpeg_quality)), CROP_PX)


def draw_jpeg_quality(generator: np.random.Generator) -> int:
    """A quality from 40 to 80, each equally likely."""
    low, high = _JPEG_QUALITY
    return int(generator.integers(low, high + 1))
