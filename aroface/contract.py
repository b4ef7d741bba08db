"""The input contract: what a model was trained to see. It travels with checkpoints, exports and galleries."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from aroface.errors import ShapeError

__all__ = ["ARCFACE_TEMPLATE_112", "ColourOrder", "InputContract"]

ColourOrder = Literal["rgb", "bgr"]

#: The five landmarks (left eye, right eye, nose, mouth corners) of an aligned 112-px crop, (5, 2) x and y in pixels.
#: Source: Deng et al., ArcFace (arXiv:1801.07698); the numbers every aligned face set of the field uses.
ARCFACE_TEMPLATE_112: NDArray[np.float64] = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class InputContract(BaseModel):
    """How pixels become the input of a model: `(pixel - mean) / std`, channels in `colour_order`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(ge=16, le=1024, description="side of the square input, pixels")
    colour_order: ColourOrder = Field(description="order of the three channels that the model expects")
    mean: float = Field(default=127.5, description="subtracted from every channel, in 0..255")
    std: float = Field(default=127.5, gt=0, description="divides every channel, in 0..255")
    template: Literal["arcface_112"] = Field(
        default="arcface_112", description="landmark template the faces are aligned to, scaled to image_size"
    )

    def check_images(self, images: NDArray[np.uint8]) -> None:
        """Refuse anything but (B, S, S, 3) uint8 with S = image_size.

        Raises:
            ShapeError: another shape or type.
        """
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3) or images.dtype != np.uint8:
            raise ShapeError(
                f"The model takes uint8 RGB images of shape (B, {side}, {side}, 3), got {images.dtype} {images.shape}; "
                "resize faces with aroface.images.resize_face."
            )
