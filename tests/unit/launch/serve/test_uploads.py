"""What becomes of uploaded bytes."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from aroface.align import align_face
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import DataError
from aroface.images import encode_jpeg
from launch.serve.uploads import UnsupportedImageError, face_from_upload, parse_landmarks


def png(pixels):
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)


def test_a_square_image_is_the_crop(pixels):
    assert np.array_equal(face_from_upload(png(pixels), size=112), pixels)
    assert face_from_upload(encode_jpeg(pixels), size=48).shape == (48, 48, 3)


def test_landmarks_align_whatever_the_shape(pixels):
    photograph = np.zeros((150, 200, 3), np.uint8)
    photograph[20:132, 40:152] = pixels
    landmarks = ARCFACE_TEMPLATE_112 + np.array([40, 20])
    found = face_from_upload(png(photograph), size=112, landmarks=landmarks)
    assert np.array_equal(found, align_face(photograph, landmarks))
    assert np.abs(found[2:-2, 2:-2].astype(int) - pixels[2:-2, 2:-2]).max() <= 1


@pytest.mark.parametrize(("faces", "message"), [(0, "found 0 faces"), (2, "found 2 faces")])
def test_a_photograph_needs_exactly_one_face(faces, message):
    class Detector:
        def detect(self, pixels):
            return np.repeat(ARCFACE_TEMPLATE_112[None], faces, 0)

    photograph = png(np.zeros((50, 80, 3), np.uint8))
    with pytest.raises(DataError, match=message):
        face_from_upload(photograph, size=112, detector=Detector())
    with pytest.raises(DataError, match="80 x 50 pixels, so it is not an aligned crop"):
        face_from_upload(photograph, size=112)


def bomb():
    """A PNG that claims a hundred thousand pixels a side."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", UnsupportedImageError, "neither JPEG nor PNG"),
        (b"GIF89a" + bytes(100), UnsupportedImageError, "neither JPEG nor PNG"),
        (b"\xff\xd8\xff" + bytes(50), DataError, "JPEG file cannot be read"),
        (b"\x89PNG\r\n\x1a\n", DataError, "ends in its header"),
        (bomb(), DataError, "100000 x 100000 pixels; the limit"),
        (png(np.zeros((8, 8, 3), np.uint8)), DataError, "8 x 8 pixels; a face needs 16"),
        (encode_jpeg(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))[:4000], DataError, "The upload"),
    ],
    ids=["empty", "gif", "no-jpeg", "short-png", "bomb", "tiny", "cut-jpeg"],
)
def test_other_bytes_are_refused(data, kind, message):
    with pytest.raises(kind, match=message):
        face_from_upload(data, size=112)


def test_landmarks_are_five_finite_points():
    assert parse_landmarks(None) is parse_landmarks("") is None
    assert parse_landmarks("[[1,2],[9,2],[5,6],[2,9],[9,10]]").tolist()[4] == [9, 10]
    for text in ("[]", "x", "[[1,2]]", "[[1,2],[3,4],[5,6],[7,8],[9,NaN]]", '{"a": 1}', "[" * 5000, "[[1e999,0]]"):
        with pytest.raises(DataError, match="left eye, right eye"):
            parse_landmarks(text)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def size_chunk(side):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))


@pytest.mark.parametrize(
    "before",
    [b"", size_chunk(112), chunk(b"tEXt", struct.pack(">II", 112, 112) + b"x")],
    ids=["plain", "second-header", "text-that-looks-like-the-size"],
)
def test_a_bomb_is_not_unpacked_wherever_its_size_stands(before, monkeypatch):
    """30,000 pixels a side; all of it would be 2.7 GB."""
    made = []
    allocate = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: made.append(allocate(*args)) or made[-1])
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(90_001)) for _ in range(100)) + pack.flush()
    data = b"\x89PNG\r\n\x1a\n" + before + size_chunk(30_000) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"the limit is 12,000,000|not an image that can be decoded"):
        face_from_upload(data, size=112)
    assert all(pixels is None for pixels in made)
