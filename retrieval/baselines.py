"""What a trained model has to beat: the pixels themselves, compared as they are."""

import cv2
import numpy as np
from numpy.typing import NDArray

from aroface.contract import InputContract

__all__ = ["PixelEmbedder"]

_SIDE_PX = 28


class PixelEmbedder:
    """Grey values of the face at 28 x 28 pixels, mean removed; the cosine of two is their correlation."""

    contract = InputContract(image_size=112, colour_order="rgb")
    embedding_dim = _SIDE_PX * _SIDE_PX
    model_id = f"pixels-{_SIDE_PX}x{_SIDE_PX}"

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, 112, 112, 3) uint8 RGB to (B, 784) float32 of unit length; a face of one grey value gives zeros."""
        grey = [
            cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
            for image in images
        ]
        values = np.asarray(grey, np.float32).reshape(len(images), self.embedding_dim)
        values -= values.mean(axis=1, keepdims=True)
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        lengths[lengths == 0] = 1
        unit: NDArray[np.float32] = values / lengths
        return unit
