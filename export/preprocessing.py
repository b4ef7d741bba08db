"""From RGB crops to the input that an exported graph takes."""

import numpy as np
from numpy.typing import NDArray

from export.metadata import ModelMetadata

__all__ = ["prepare_batch"]


def prepare_batch(images: NDArray[np.uint8], metadata: ModelMetadata) -> NDArray[np.uint8] | NDArray[np.float32]:
    """(B, S, S, 3) uint8 RGB as the graph takes it: as it is, or preprocessed to (B, 3, S, S) float32."""
    if metadata.input_layout == "uint8_nhwc":
        return np.ascontiguousarray(images)
    ordered = images[..., ::-1] if metadata.colour_order == "bgr" else images
    pixels = (ordered.astype(np.float32) - np.float32(metadata.mean)) / np.float32(metadata.std)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
