import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import minimize

from aroface.align import align_face, similarity_to_template
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import DataError


def test_the_template_itself_stays():
    assert_allclose(similarity_to_template(ARCFACE_TEMPLATE_112), [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    half = similarity_to_template(ARCFACE_TEMPLATE_112, size=56)
    assert_allclose(half, [[0.5, 0, 0], [0, 0.5, 0]], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_similarity_is_the_least_squares_one(seed):
    rng = np.random.default_rng(seed)
    points = ARCFACE_TEMPLATE_112 * rng.uniform(0.5, 3) + rng.normal(0, 6, (5, 2)) + rng.uniform(-50, 50, 2)

    def error(p):
        matrix = np.array([[p[0], -p[1], p[2]], [p[1], p[0], p[3]]])
        return (((points @ matrix[:, :2].T + matrix[:, 2]) - ARCFACE_TEMPLATE_112) ** 2).sum()

    best = minimize(error, [1.0, 0, 0, 0], method="BFGS")
    found = similarity_to_template(points)
    assert found[0, 0] == found[1, 1] and found[0, 1] == -found[1, 0]  # noqa: PT018 - one statement about a similarity
    assert error([found[0, 0], found[1, 0], found[0, 2], found[1, 2]]) <= best.fun + 1e-6


def test_aligning_undoes_a_turned_image():
    yy, xx = np.mgrid[0:112, 0:112]
    image = np.stack([xx, yy, (xx + yy) // 2], 2).astype(np.uint8)
    turned = np.ascontiguousarray(np.rot90(image))  # (x, y) -> (y, 111 - x)
    points = np.column_stack([ARCFACE_TEMPLATE_112[:, 1], 111 - ARCFACE_TEMPLATE_112[:, 0]])
    assert_allclose(align_face(turned, points)[2:-2, 2:-2].astype(int), image[2:-2, 2:-2].astype(int), atol=1)


@pytest.mark.parametrize(
    ("points", "message"), [(np.zeros((5, 2)), "at one place"), (np.full((5, 2), np.nan), "finite"), ([1, 2], "Five")]
)
def test_unusable_landmarks_are_refused(points, message):
    with pytest.raises(DataError, match=message):
        align_face(np.zeros((20, 20, 3), np.uint8), points)
