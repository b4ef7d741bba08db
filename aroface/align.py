"""Aligning a face by five landmarks: the similarity that brings them to the ArcFace template."""

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import DataError

__all__ = ["align_face", "similarity_to_template"]


def similarity_to_template(landmarks: ArrayLike, *, size: int = 112) -> NDArray[np.float64]:
    """Least-squares similarity from landmarks to the template, without reflection.

    Args:
        landmarks: (5, 2) x and y of left eye, right eye, nose, left and right mouth corner, pixels of the image.
        size: side of the aligned crop; the template of 112 px is scaled to it.

    Returns:
        (2, 3) matrix that maps image pixels to pixels of the crop.

    Raises:
        DataError: the landmarks are not finite, or all at one place.

    Source: Umeyama, PAMI 13 (1991), for the plane, where rotation and scale are one complex number.
    """
    points = np.asarray(landmarks, np.float64).reshape(-1, 2)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise DataError(f"Five finite landmarks (x, y) are needed to align a face, not {np.asarray(landmarks)!r}.")
    template = ARCFACE_TEMPLATE_112 * (size / 112)
    mean, template_mean = points.mean(0), template.mean(0)
    source = (points - mean) @ [1, 1j]
    target = (template - template_mean) @ [1, 1j]
    spread = float((np.abs(source) ** 2).sum())
    if spread < 1e-6:
        raise DataError(f"The five landmarks lie at one place, ({mean[0]:g}, {mean[1]:g}); a face has them apart.")
    turn = complex((np.conj(source) @ target) / spread)
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.column_stack([linear, template_mean - linear @ mean])


def align_face(pixels: NDArray[np.uint8], landmarks: ArrayLike, *, size: int = 112) -> NDArray[np.uint8]:
    """Crop a face to (size, size, 3): one bilinear resampling, black outside the image.

    Args:
        pixels: (H, W, 3) uint8.
        landmarks: as `similarity_to_template`.
        size: side of the crop.

    Raises:
        DataError: unusable landmarks.
    """
    matrix = similarity_to_template(landmarks, size=size)
    return np.asarray(cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_LINEAR), np.uint8)
