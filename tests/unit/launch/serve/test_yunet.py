"""The detector plug-in, with a stand-in for the network behind it: its landmarks in our order and in pixels."""

import cv2
import numpy as np
import pytest

from aroface.errors import ConfigError
from launch.serve.yunet import YuNet


class Network:
    """`cv2.FaceDetectorYN`: finds what it is told to, in the image that it is given."""

    found = None

    @classmethod
    def create(cls, model, config, size, score_threshold):
        cls.score_threshold = score_threshold
        return cls()

    def setInputSize(self, size):  # noqa: N802 - OpenCV's name
        self.size = size

    def detect(self, image):
        assert image.shape == (self.size[1], self.size[0], 3)
        assert image.flags.c_contiguous
        Network.image = image
        return 1, Network.found


@pytest.fixture
def detector(tmp_path, monkeypatch):
    (tmp_path / "yunet.onnx").write_bytes(b"a model")
    monkeypatch.setattr(cv2, "FaceDetectorYN", Network)
    return YuNet(tmp_path / "yunet.onnx")


def row(points, score=0.9):
    """A face of YuNet: box, five points, score."""
    return [1, 2, 3, 4, *np.ravel(points), score]


POINTS = np.array([[30, 40], [60, 41], [45, 60], [33, 80], [58, 81]], np.float32)


def test_landmarks_are_those_of_the_network_in_its_order(detector):
    Network.found = np.array([row(POINTS), row(POINTS + 100)], np.float32)
    found = detector.detect(np.zeros((480, 600, 3), np.uint8))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [POINTS, POINTS + 100])


def test_large_photographs_are_shrunk_and_the_landmarks_grow_back(detector):
    Network.found = np.array([row(POINTS)], np.float32)
    found = detector.detect(np.zeros((1280, 2560, 3), np.uint8))
    assert Network.image.shape == (320, 640, 3)
    np.testing.assert_allclose(found, [POINTS * 4])


def test_the_network_sees_bgr(detector):
    Network.found = None
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[..., 0] = 200  # red
    assert detector.detect(pixels).shape == (0, 5, 2)
    assert Network.image[0, 0].tolist() == [0, 0, 200]


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        YuNet(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(ConfigError, match="cannot be loaded as a YuNet model"):
        YuNet(tmp_path / "bad.onnx")
