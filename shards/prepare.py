"""What happens to one image file on its way into a shard: by default nothing but a look at its header."""

from dataclasses import dataclass
from typing import Literal

import simplejpeg

from aroface.align import align_face
from aroface.errors import DataError
from aroface.images import MAX_PIXELS, decode_rgb, encode_jpeg, resize_face
from shards.sources.base import Landmarks

__all__ = ["Preparation", "Prepared", "image_size"]

_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Prepared:
    """An image file ready to be stored."""

    data: bytes
    suffix: str | None  #: of a file that was encoded anew; None keeps the suffix of the source
    size: tuple[int, int]  #: width and height in pixels


@dataclass(frozen=True)
class Preparation:
    """How images are changed; equal settings and an equal file give an equal file."""

    align: bool = False  #: crop by five landmarks to the ArcFace template
    size: int | None = None  #: side of the stored image in pixels; None keeps it (112 when aligned)
    quality: int | None = None  #: encode every image anew as JPEG of this quality; None: only those that change
    check: Literal["header", "decode"] = "header"  #: how an image is looked at that is stored as it is

    def apply(self, data: bytes, landmarks: Landmarks | None, *, name: str) -> Prepared:
        """Prepare one image file.

        Raises:
            DataError: it cannot be read, has no landmarks to align by, or is not square where it must be.
        """
        if not self.align and self.quality is None and self.size is None and self.check == "header":
            return Prepared(data, None, image_size(data, name=name))
        pixels = decode_rgb(data, name=name)
        changed = self.quality is not None
        if self.align:
            if landmarks is None:
                raise DataError(f"{name}: no landmarks to align it by; give them with --landmarks, or drop --align.")
            pixels, changed = align_face(pixels, landmarks, size=self.size or 112), True
        elif self.size is not None and pixels.shape[:2] != (self.size, self.size):
            if pixels.shape[0] != pixels.shape[1]:
                raise DataError(
                    f"{name}: {pixels.shape[1]} x {pixels.shape[0]} pixels cannot become {self.size} x {self.size} "
                    "without distortion; align it (--align), or crop it first."
                )
            pixels, changed = resize_face(pixels, self.size), True
        size = (pixels.shape[1], pixels.shape[0])
        if not changed:
            return Prepared(data, None, size)
        return Prepared(encode_jpeg(pixels, quality=self.quality or _JPEG_QUALITY), ".jpg", size)


def image_size(data: bytes, *, name: str) -> tuple[int, int]:
    """Width and height of an image file without decoding a JPEG; its end marker must be there.

    Raises:
        DataError: not an image, cut short, or of more than `MAX_PIXELS` pixels.
    """
    if data[:3] != b"\xff\xd8\xff":
        pixels = decode_rgb(data, name=name)
        return pixels.shape[1], pixels.shape[0]
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DataError(f"{name}: not a readable JPEG ({error}).") from error
    if height * width > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels is over the limit of {MAX_PIXELS}; drop or shrink it.")
    if b"\xff\xd9" not in data[-64:]:
        raise DataError(f"{name}: the JPEG is cut short (no end marker).")
    return width, height
