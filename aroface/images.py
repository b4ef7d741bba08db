"""From the bytes of an image file to uint8 RGB pixels, and between sizes. The one place where faces are decoded."""

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from aroface.errors import DataError

__all__ = ["MAX_PIXELS", "decode_rgb", "encode_jpeg", "resize_face"]

#: Images with more pixels are refused before they are decoded (a decompression bomb is small on disk).
MAX_PIXELS = 64 << 20

_JPEG_MAGIC = b"\xff\xd8\xff"


def decode_rgb(data: bytes | memoryview, *, name: str = "image") -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3) uint8 RGB. Grey and palette images become RGB; alpha is dropped.

    Args:
        data: the bytes of a JPEG, PNG, BMP or WebP file.
        name: what the error message calls the image, such as `shard.tar: key`.

    Raises:
        DataError: the bytes are not an image, are cut short, or hold more than `MAX_PIXELS` pixels.
    """
    if bytes(data[:3]) == _JPEG_MAGIC:
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if height * width > MAX_PIXELS:
                raise DataError(
                    f"{name}: {width} x {height} pixels is over the limit of {MAX_PIXELS}; drop or shrink it."
                )
            if space != "CMYK":
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
        except ValueError as error:
            raise DataError(f"{name}: not a readable JPEG ({error}).") from error
    return _decode_other(np.frombuffer(data, np.uint8), name)


def _decode_other(data: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if len(data) else None
    except cv2.error as error:
        raise DataError(f"{name}: the image cannot be decoded ({error.err}).") from error
    if pixels is None:
        raise DataError(f"{name}: not an image that can be decoded ({len(data)} bytes); JPEG and PNG are.")
    return np.asarray(pixels, np.uint8)


def encode_jpeg(pixels: NDArray[np.uint8], *, quality: int = 95) -> bytes:
    """(H, W, 3) uint8 RGB to the bytes of a JPEG file with full colour resolution; deterministic."""
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444")
    return encoded


def resize_face(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale a square crop to (size, size, 3): by area when it shrinks, bilinearly when it grows, else untouched."""
    if pixels.shape[0] == size and pixels.shape[1] == size:
        return pixels
    shrinks = pixels.shape[0] >= size and pixels.shape[1] >= size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (size, size), interpolation=interpolation), np.uint8)
