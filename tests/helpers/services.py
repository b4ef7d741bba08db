"""What the tests of the service send: a key, and pictures that stand for faces."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

KEY = "0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def face(seed: int) -> NDArray[np.uint8]:
    """A smooth random picture: neighbouring pixels belong together, as in a face."""
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 14, 3)).astype(np.uint8)
    return cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def png(pixels: NDArray[Any]) -> bytes:
    """A PNG file of RGB pixels."""
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()


def image(seed: int) -> tuple[str, bytes, str]:
    """The face as a file of a form."""
    return "face.png", png(face(seed)), "image/png"
