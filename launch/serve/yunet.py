"""OpenCV's YuNet as the detector, from a model file that the user gives."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from aroface.errors import ConfigError

__all__ = ["YuNet"]

_LONGEST_SIDE = 640


class YuNet:
    """`launch.serve.uploads.Detector` on `cv2.FaceDetectorYN`.

    Args:
        model: `face_detection_yunet_*.onnx` of the OpenCV model zoo; none is bundled.
        min_score: confidence below which a face is not reported.

    Raises:
        ConfigError: the file is missing or is not such a model.
    """

    def __init__(self, model: Path, *, min_score: float = 0.8) -> None:
        if not model.is_file():
            raise ConfigError(f"--detector {model} does not exist; name a YuNet .onnx file of the OpenCV model zoo.")
        try:
            self._detector = cv2.FaceDetectorYN.create(str(model), "", (320, 320), score_threshold=min_score)
        except cv2.error as error:
            raise ConfigError(f"--detector {model} cannot be loaded as a YuNet model: {error.err}.") from error
        self._lock = threading.Lock()  # the input size is state of the detector

    def detect(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(H, W, 3) uint8 RGB to (F, 5, 2) landmarks in the template's order, best face first."""
        height, width = pixels.shape[:2]
        shrink = min(1.0, _LONGEST_SIDE / max(height, width))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        image = cv2.resize(pixels[:, :, ::-1], size, interpolation=cv2.INTER_AREA)
        with self._lock:
            self._detector.setInputSize(size)
            found: Any = self._detector.detect(np.ascontiguousarray(image))[1]  # None where there is no face
        if found is None:
            return np.zeros((0, 5, 2))
        # Columns 4 to 13: right eye, left eye, nose, right and left mouth corner of the person, which are left to right
        # in the picture, as in the template.
        landmarks: NDArray[np.float64] = np.asarray(found[:, 4:14], np.float64).reshape(-1, 5, 2) / shrink
        return landmarks
