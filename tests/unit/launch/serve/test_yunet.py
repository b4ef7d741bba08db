"""The detector plug-in, with a stand-in for the network behind it: its landmarks in our order and in pixels."""

import os
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ConfigError
from launch.serve.yunet import YuNet
from shards.synthetic import write_synthetic


class Network:
    """`cv2.FaceDetectorYN`: finds what it is told to, in the image that it is given."""

    found = None
    images = ()

    @classmethod
    def create(cls, model, config, size, score_threshold):
        cls.score_threshold = score_threshold
        return cls()

    def setInputSize(self, size):  # noqa: N802 - OpenCV's name
        self.size = size

    def detect(self, image):
        assert image.shape == (self.size[1], self.size[0], 3)
        assert image.flags.c_contiguous
        Network.images.append(image)
        return 1, Network.found(image) if callable(Network.found) else Network.found


@pytest.fixture
def detector(tmp_path, monkeypatch):
    (tmp_path / "yunet.onnx").write_bytes(b"a model")
    monkeypatch.setattr(cv2, "FaceDetectorYN", Network)
    monkeypatch.setattr(Network, "found", None)
    monkeypatch.setattr(Network, "images", [])
    yunet = YuNet(tmp_path / "yunet.onnx")
    Network.images.clear()  # the one that it tries at the start
    return yunet


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
    assert Network.images[0].shape == (320, 640, 3)
    np.testing.assert_allclose(found, [POINTS * 4])


def test_the_network_sees_bgr(detector):
    Network.found = None
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[..., 0] = 200  # red
    assert detector.detect(pixels).shape == (0, 5, 2)
    assert Network.images[0][0, 0].tolist() == [0, 0, 200]


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def turned(points, degrees):
    """The points turned clockwise as seen."""
    centre = points.mean(0)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return (points - centre) @ np.array([[c, s], [-s, c]]) + centre


def dots(points, shape):
    """A photograph of a face that consists of five dots."""
    pixels = np.full((*shape, 3), 127, np.uint8)
    for (x, y), colour in zip(points, COLOURS, strict=True):
        cv2.circle(pixels, (round(x * 16), round(y * 16)), 4 * 16, colour, -1, cv2.LINE_8, shift=4)
    return pixels


def find_dots(image):
    """Where they are in what the network sees, (5, 2)."""
    distances = [np.abs(image[..., ::-1].astype(int) - colour).max(2) for colour in COLOURS]
    return np.array([np.argwhere(distance < 60).mean(0)[::-1] for distance in distances])


def test_the_looks_at_the_upright_face_undo_what_the_first_got_wrong(detector):
    """A network that sees upright faces well, and draws of tilted ones a quarter of the tilt only."""
    truth = turned(ARCFACE_TEMPLATE_112 + np.array([250, 90]), 25)
    upright = find_dots(dots(ARCFACE_TEMPLATE_112 * 3, (336, 336))[..., ::-1])

    def network(image):
        if not np.ptp(image):
            return None
        seen = find_dots(image)
        a, b = ((points - points.mean(0)) @ [1, 1j] for points in (upright, seen))
        tilt = np.rad2deg(np.angle(np.vdot(a, b)))
        return np.array([row(turned(seen, -0.75 * tilt)), row(seen + 2000)], np.float32)  # and another, far away

    Network.found = network
    found = detector.detect(dots(truth, (300, 500)))
    assert len(found) == 2
    assert Network.images[1].shape == (640, 640, 3)
    first = network(Network.images[0])[0, 4:14].reshape(5, 2)
    errors = [np.linalg.norm(points - truth, axis=1).mean() for points in (first, found[0])]
    assert errors[0] > 6
    assert errors[1] == pytest.approx(0.75**2 * errors[0], rel=0.1)


def test_landmarks_stay_where_the_second_look_sees_nothing(detector):
    Network.found = lambda image: np.array([row(POINTS)], np.float32) if len(Network.images) == 1 else None
    np.testing.assert_allclose(detector.detect(np.zeros((480, 600, 3), np.uint8)), [POINTS])
    Network.images.clear()
    Network.found = lambda image: np.array([row(0 * POINTS)], np.float32)  # all at one place: nothing to turn
    assert not detector.detect(np.zeros((480, 600, 3), np.uint8)).any()


@pytest.mark.parametrize("degrees", [-25, 0, 25])
def test_a_real_model_finds_a_drawn_face_that_is_tilted(degrees, tmp_path):
    """With the file that AROFACE_TEST_YUNET names."""
    model = os.environ.get("AROFACE_TEST_YUNET")
    if not model:
        pytest.skip("needs AROFACE_TEST_YUNET=YUNET.onnx")
    detector, errors = YuNet(Path(model)), []
    write_synthetic(tmp_path, identities=8, images_per_identity=1, seed=9)
    for path in sorted(tmp_path.rglob("*.jpg")):
        crop = cv2.imread(str(path))[..., ::-1]
        matrix = cv2.getRotationMatrix2D((56, 56), -degrees, 1) + np.array([[0, 0, 200], [0, 0, 120]])
        photograph = cv2.warpAffine(crop, matrix, (520, 360), borderValue=(127, 127, 127))
        found = detector.detect(photograph)
        truth = ARCFACE_TEMPLATE_112 @ matrix[:, :2].T + matrix[:, 2]
        errors += [np.linalg.norm(points - truth, axis=1).mean() for points in found[:1]]
    assert len(errors) > 0
    assert np.median(errors) < 7


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        YuNet(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(ConfigError, match="name a face_detection_yunet"):
        YuNet(tmp_path / "bad.onnx")


def test_a_network_of_another_kind_is_refused_at_the_start(tmp_path):
    """OpenCV loads it as a detector; its outputs have other names than YuNet's."""
    path = tmp_path / "other.onnx"
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 320, 320]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", sides[:1], sides[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    cv2.FaceDetectorYN.create(str(path), "", (320, 320))
    with pytest.raises(ConfigError, match="other.onnx is no YuNet model .* name a face_detection_yunet"):
        YuNet(path)
