"""OpenCV's YuNet as the detector, from a model file that the user gives."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from aroface.align import similarity_to_template
from aroface.errors import ConfigError, DataError

__all__ = ["YuNet"]

_LONGEST_SIDE = 640
_MORE_LOOKS = 2  # at every face
_FACE_SIDE = 320  # of the face then, in the middle of a square twice as large


class YuNet:
    """`launch.serve.uploads.Detector` on `cv2.FaceDetectorYN`.

    The network draws the landmarks of small, tilted faces nearer to an upright face than they are. So it looks
    at the photograph, then twice more at the face turned upright and enlarged by what it found before.

    Args:
        model: `face_detection_yunet_*.onnx` of the OpenCV model zoo; none is bundled.
        min_score: confidence below which a face is not reported.

    Raises:
        ConfigError: the file is missing or is not such a model.
    """

    def __init__(self, model: Path, *, min_score: float = 0.8) -> None:
        if not model.is_file():
            raise ConfigError(f"--detector {model} does not exist; name a YuNet .onnx file of the OpenCV model zoo.")
        self._lock = threading.Lock()  # the input size is state of the detector
        try:
            self._detector = cv2.FaceDetectorYN.create(str(model), "", (320, 320), score_threshold=min_score)
            self._look(np.zeros((320, 320, 3), np.uint8))  # OpenCV loads any network, and misses its outputs only here
        except cv2.error as error:
            reason = " ".join(error.err.split())
            raise ConfigError(
                f"--detector {model} is no YuNet model that OpenCV runs ({reason}); name a "
                "face_detection_yunet_*.onnx of the OpenCV model zoo."
            ) from error

    def detect(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(H, W, 3) uint8 RGB to (F, 5, 2) landmarks in the template's order, best face first."""
        height, width = pixels.shape[:2]
        shrink = min(1.0, _LONGEST_SIDE / max(height, width))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        found: NDArray[np.float64] = self._look(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)) / shrink
        for _ in range(_MORE_LOOKS):
            found = np.array([self._look_again(pixels, landmarks) for landmarks in found]).reshape(-1, 5, 2)
        return found

    def _look(self, pixels: Any) -> NDArray[np.float64]:
        """(H, W, 3) uint8 RGB to (F, 5, 2) landmarks, from the network in one pass."""
        image = np.ascontiguousarray(pixels[:, :, ::-1])
        with self._lock:
            self._detector.setInputSize(image.shape[1::-1])
            found: Any = self._detector.detect(image)[1]  # None where there is no face
        if found is None:
            return np.zeros((0, 5, 2))
        # Columns 4 to 13: right eye, left eye, nose, right and left mouth corner of the person, which are left to right
        # in the picture, as in the template.
        landmarks: NDArray[np.float64] = np.asarray(found[:, 4:14], np.float64).reshape(-1, 5, 2)
        return landmarks

    def _look_again(self, pixels: NDArray[np.uint8], landmarks: NDArray[np.float64]) -> NDArray[np.float64]:
        """(5, 2) landmarks in the photograph, from the face that the first ones turn upright; or those as they are."""
        try:
            matrix = similarity_to_template(landmarks, size=_FACE_SIDE)
        except DataError:
            return landmarks
        matrix[:, 2] += _FACE_SIDE / 2
        square = (2 * _FACE_SIDE, 2 * _FACE_SIDE)
        upright = cv2.warpAffine(pixels, matrix, square, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        found = self._look(upright)
        if len(found) == 0:
            return landmarks
        expected = landmarks @ matrix[:, :2].T + matrix[:, 2]
        distances = np.linalg.norm(found - expected, axis=2).mean(1)
        if distances.min() > _FACE_SIDE / 4:  # another face
            return landmarks
        back = cv2.invertAffineTransform(matrix)
        return np.asarray(found[distances.argmin()] @ back[:, :2].T + back[:, 2], np.float64)
