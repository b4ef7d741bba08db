"""Decoding: every kind of image becomes RGB, everything else a clear error."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from aroface.errors import DataError
from aroface.images import decode_rgb, encode_jpeg, resize_face


def picture(height=24, width=20):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 12, y * 10, np.full_like(x, 128)], 2).astype(np.uint8)


def png(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_jpeg_round_trip_keeps_the_colour_order():
    pixels = picture()
    assert np.abs(decode_rgb(encode_jpeg(pixels, quality=100)).astype(int) - pixels).max() <= 6


def test_png_with_alpha_grey_and_palette_become_rgb():
    pixels = picture()
    bgra = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGRA)
    assert np.array_equal(decode_rgb(png(bgra)), pixels)
    grey = pixels[..., 0]
    assert np.array_equal(decode_rgb(png(grey)), np.repeat(grey[..., None], 3, 2))


def test_grey_jpeg_becomes_rgb():
    data = cv2.imencode(".jpg", picture()[..., 0])[1].tobytes()
    decoded = decode_rgb(data)
    assert decoded.shape == (24, 20, 3)
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_jpeg_is_refused(share):
    data = encode_jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="a.zip: x"):
        decode_rgb(data[: int(share * len(data))], name="a.zip: x")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DataError):
        decode_rgb(data)


def test_decompression_bomb_is_refused_unread():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError):
        decode_rgb(bomb)


def test_resize_keeps_the_mean_and_leaves_equal_sizes_alone():
    pixels = picture(112, 112)
    assert resize_face(pixels, 112) is pixels
    assert abs(resize_face(pixels, 56).mean() - pixels.mean()) < 1
    assert resize_face(pixels, 128).shape == (128, 128, 3)
