"""The geometry of misalignment against published numbers and an independent resampler; draws that repeat."""

import cv2
import numpy as np
import pytest

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ConfigError
from retrieval.baselines import PixelEmbedder
from retrieval.degrade import (
    ALIGNED,
    INTER_OCULAR_PX,
    Misalignment,
    draw_jpeg_quality,
    generator_for,
    jitter_landmarks,
    low_quality,
    misalign,
    move_points,
    nme,
    sample_misalignment,
)

NOISE = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
SMOOTH = cv2.GaussianBlur(NOISE, (0, 0), 6.0)


def test_landmarks_move_as_in_the_protocol() -> None:
    # Test vector TV11 of the evaluation protocols (FAE-1): theta 10 degrees, scale 1.1, shift (4, -2).
    error = Misalignment(10.0, 1.1, (4.0, -2.0))
    expected = [
        [41.58814, 46.09304],
        [79.79743, 52.61267],
        [56.96754, 71.18924],
        [37.34558, 90.77121],
        [68.98742, 96.17024],
    ]
    np.testing.assert_allclose(move_points(ARCFACE_TEMPLATE_112, error), expected, atol=1e-5)
    assert pytest.approx(35.23773900025369) == INTER_OCULAR_PX
    assert nme(error) == pytest.approx(0.129297, abs=1e-6)
    assert nme(ALIGNED) == 0.0


def test_pixels_move_with_the_landmarks() -> None:
    for x, y in ARCFACE_TEMPLATE_112.round():
        image = np.zeros((112, 112, 3), np.uint8)
        cv2.circle(image, (int(x), int(y)), 3, (255, 255, 255), -1)
        error = Misalignment(10.0, 1.1, (4.0, -2.0))
        weights = misalign(image, error)[..., 0].astype(float)
        rows, columns = np.indices(weights.shape)
        centroid = [(columns * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()]
        np.testing.assert_allclose(centroid, move_points([x, y], error), atol=0.15)


def test_exact_cases_of_the_warp() -> None:
    assert misalign(NOISE, ALIGNED) is NOISE
    np.testing.assert_array_equal(misalign(NOISE, Misalignment(90.0)), np.rot90(NOISE, -1))
    shifted = misalign(NOISE, Misalignment(shift_px=(3.0, -2.0)))
    np.testing.assert_array_equal(shifted[:-2, 3:], NOISE[2:, :-3])
    assert not shifted[:, :3].any()
    assert not shifted[-2:].any()


def test_shifts_grow_with_the_crop() -> None:
    large = cv2.resize(SMOOTH, (224, 224), interpolation=cv2.INTER_LINEAR)
    error = Misalignment(5.0, 0.9, (6.0, 3.0))
    small_of_large = cv2.resize(misalign(large, error), (112, 112), interpolation=cv2.INTER_AREA)
    inner = np.s_[20:-20, 20:-20]
    assert np.abs(small_of_large[inner].astype(int) - misalign(SMOOTH, error)[inner].astype(int)).max() <= 4


@pytest.mark.parametrize("severity", [0.0, 0.3, 1.0])
def test_draws_fill_the_box_and_nothing_else(severity: float) -> None:
    errors = [sample_misalignment(generator_for("t", f"k{i}"), severity) for i in range(2000)]
    values = np.array([[e.theta_deg / 15, (e.scale - 1) / 0.2, e.shift_px[0] / 8, e.shift_px[1] / 8] for e in errors])
    assert np.abs(values).max() <= severity + 1e-9
    assert np.abs(values).max(axis=0) == pytest.approx(severity, rel=0.01)
    assert np.abs(values.mean(axis=0)).max() <= 0.05 * severity


def test_a_severity_outside_the_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"outside \[0, 1\]"):
        sample_misalignment(generator_for("t", "k"), 1.5)


def test_draws_belong_to_task_key_and_trial() -> None:
    draws = {generator_for(*name).random() for name in [("a", "k", 0), ("b", "k", 0), ("a", "l", 0), ("a", "k", 1)]}
    assert len(draws) == 4
    assert generator_for("a", "k", 0).random() in draws
    qualities = {draw_jpeg_quality(generator_for("q", str(i))) for i in range(2000)}
    assert qualities == set(range(40, 81))


def test_fewer_pixels_lose_more() -> None:
    loss = [
        np.abs(low_quality(SMOOTH, size_px=size, jpeg_quality=80).astype(int) - SMOOTH).mean()
        for size in (40, 28, 20, 14)
    ]
    assert loss == sorted(loss)
    assert low_quality(NOISE, size_px=14, jpeg_quality=40).shape == (112, 112, 3)


def test_the_pixel_baseline_ignores_brightness_and_contrast() -> None:
    faces = np.stack([SMOOTH, np.uint8(200) - SMOOTH // 2, NOISE, np.full_like(NOISE, 77)])
    embeddings = PixelEmbedder().embed(faces)
    assert embeddings.shape == (4, PixelEmbedder.embedding_dim)
    assert embeddings[0] @ embeddings[1] < -0.9
    assert abs(embeddings[0] @ embeddings[2]) < 0.9
    assert not embeddings[3].any()


def test_wrong_landmarks_become_the_similarity_that_undoes_them() -> None:
    assert nme(jitter_landmarks(np.random.default_rng(0), 0.0)) == pytest.approx(0, abs=1e-6)
    sizes = []
    for sigma in (0.02, 0.1):
        errors = []
        for seed in range(200):
            noise = np.random.default_rng(seed).standard_normal((5, 2))
            found = ARCFACE_TEMPLATE_112 + sigma * INTER_OCULAR_PX * noise
            moved = move_points(found, jitter_landmarks(np.random.default_rng(seed), sigma))
            left = np.linalg.norm(moved - ARCFACE_TEMPLATE_112, axis=1)
            assert (left**2).sum() <= (np.linalg.norm(found - ARCFACE_TEMPLATE_112, axis=1) ** 2).sum() + 1e-6
            errors.append(nme(jitter_landmarks(np.random.default_rng(seed), sigma)))
        sizes.append(np.mean(errors))
    assert 3 < sizes[1] / sizes[0] < 7
