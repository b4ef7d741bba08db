"""From uint8 RGB pixels to the input of a model, on the device: the one place where an `InputContract` is applied."""

import torch
from torch import Tensor

from aroface.contract import InputContract
from aroface.errors import ShapeError

__all__ = ["normalise"]


def normalise(images: Tensor, contract: InputContract) -> Tensor:
    """Order the channels as the model expects and apply `(pixel - mean) / std`.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        contract: colour order, mean and std of the model.

    Returns:
        (B, 3, H, W) float32 on the device of `images`. The memory stays in the order of the pixels, which is PyTorch's
        channels-last, so no copy is needed for it.

    Raises:
        ShapeError: `images` is not (B, H, W, 3) uint8.
    """
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
        raise ShapeError(
            f"Images must be uint8 RGB of shape (B, H, W, 3), got {images.dtype} {tuple(images.shape)}; "
            "decode them with aroface.images.decode_rgb and stack them."
        )
    pixels = images.to(torch.float32)
    if contract.colour_order == "bgr":
        pixels = pixels.flip(3)
    return ((pixels - contract.mean) / contract.std).permute(0, 3, 1, 2)
