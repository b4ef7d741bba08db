"""From an uploaded file to an aligned crop: what is accepted, and what is said about the rest."""

import json
import struct
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aroface.align import align_face
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import DataError
from aroface.images import decode_rgb, resize_face

__all__ = ["MAX_PIXELS", "Detector", "UnsupportedImageError", "face_from_upload", "parse_landmarks"]

#: Pixels of an uploaded image at the most; 12 megapixels are a phone's photograph.
MAX_PIXELS = 12_000_000
_SMALLEST_SIDE = 16
_FLATTEST = 0.02  # spread of landmarks across their main direction, over the spread along it
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_SIZE = struct.Struct(">II")


class UnsupportedImageError(DataError):
    """The upload is not a JPEG or PNG file."""


class Detector(Protocol):
    """Finds faces in a photograph."""

    def detect(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(H, W, 3) uint8 RGB to (F, 5, 2) landmarks in pixels, best face first."""
        ...


def face_from_upload(
    data: bytes, *, size: int, landmarks: NDArray[np.float64] | None = None, detector: Detector | None = None
) -> NDArray[np.uint8]:
    """The (size, size, 3) crop of one face.

    With landmarks the face is aligned by them. Without, a square image is taken as an aligned crop, and any other is
    given to the detector, if there is one.

    Args:
        data: bytes of a JPEG or PNG file.
        size: side of the crop in pixels.
        landmarks: (5, 2), see `aroface.align`; None: already aligned, or to be detected.
        detector: finds the landmarks of photographs.

    Raises:
        UnsupportedImageError: neither JPEG nor PNG.
        DataError: unreadable, too large or too small, no face or several, or unusable landmarks.
    """
    pixels = _decode(data)
    height, width = pixels.shape[:2]
    if min(height, width) < _SMALLEST_SIDE:
        raise DataError(f"The image has {width} x {height} pixels; a face needs {_SMALLEST_SIDE} on each side.")
    if landmarks is not None:
        return align_face(pixels, landmarks, size=size)
    if height == width:
        return resize_face(pixels, size)
    if detector is None:
        raise DataError(
            f"The image has {width} x {height} pixels, so it is not an aligned crop, which is square. Send the five "
            "landmarks of the face with it, or start the service with --detector."
        )
    found = detector.detect(pixels)
    if len(found) != 1:
        raise DataError(f"The detector found {len(found)} faces; send an image of exactly one.")
    return align_face(pixels, found[0], size=size)


def _decode(data: bytes) -> NDArray[np.uint8]:
    if data.startswith(_PNG):
        if len(data) < 24:
            raise DataError("The PNG file ends in its header; send the whole file.")
        width, height = _PNG_SIZE.unpack(data[16:24])
        _check_pixels(width, height)
    elif data.startswith(_JPEG):
        import simplejpeg

        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise DataError(f"The JPEG file cannot be read ({error}); send the whole file.") from error
        _check_pixels(width, height)
    else:
        raise UnsupportedImageError(f"The upload of {len(data)} bytes is neither JPEG nor PNG; send one of these.")
    return decode_rgb(data, name="The upload")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"The image has {width} x {height} pixels; the limit is {MAX_PIXELS:,}. Shrink or crop it.")


def parse_landmarks(text: str | None) -> NDArray[np.float64] | None:
    """`[[x, y], ...]` of five landmarks as an array; None for None or an empty text.

    Raises:
        DataError: anything else, points on one line, or a mirrored face.
    """
    if not text:
        return None
    example = "[[38.3, 51.7], [73.5, 51.5], [56.0, 71.7], [41.5, 92.4], [70.7, 92.2]]"
    try:
        values: Any = json.loads(text)
        points = np.array(values, np.float64)
    except (ValueError, TypeError, RecursionError, OverflowError):
        points = np.zeros(0)
    if points.shape != (5, 2) or not np.isfinite(points).all() or np.abs(points).max() > 1e6:
        raise DataError(
            f"landmarks = {text[:80]!r}: five [x, y] in pixels are needed, of left eye, right eye, nose, left and "
            f"right mouth corner, such as {example}."
        )
    _check_shape(points)
    return points


def _check_shape(points: NDArray[np.float64]) -> None:
    """Refuse what no similarity brings near the template: points on a line, and a mirrored face."""
    centred = points - points.mean(0)
    longest, shortest = np.linalg.svd(centred, compute_uv=False)
    if shortest <= _FLATTEST * longest:
        raise DataError("landmarks: the five points lie on one line or at one place; a face has them apart.")
    source = centred @ [1, 1j]
    target = (ARCFACE_TEMPLATE_112 - ARCFACE_TEMPLATE_112.mean(0)) @ [1, 1j]
    if abs(source @ target) > abs(np.conj(source) @ target):  # the least-squares fits with and without a reflection
        raise DataError(
            "landmarks: the face is mirrored. Left and right are meant as seen in the picture: the left eye and mouth "
            "corner are those with the smaller x in an upright face."
        )
