from pathlib import Path

import numpy as np
import pytest

from aroface.errors import DataError
from shards.faces import open_face_set
from shards.synthetic import render_face, write_synthetic


def test_a_face_is_a_function_of_its_arguments() -> None:
    face = render_face(3, 4)
    assert face.shape == (112, 112, 3)
    assert face.dtype == np.uint8
    assert np.array_equal(face, render_face(3, 4))
    assert not np.array_equal(face, render_face(3, 5))
    assert not np.array_equal(face, render_face(2, 4))


def test_identity_shows_through_but_not_to_raw_pixels() -> None:
    faces = np.array([[render_face(person, image) for image in range(2)] for person in range(60)], np.float32)
    pixels = faces.reshape(60, 2, -1)
    pixels -= pixels.mean(-1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=-1, keepdims=True)
    similarity = pixels[:, 0] @ pixels[:, 1].T
    rank_1 = np.mean(similarity.argmax(0) == np.arange(60))
    assert 2 / 60 < rank_1 < 0.7
    assert np.diag(similarity).mean() > similarity.mean()


def test_writes_a_face_set(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "one", identities=3, images_per_identity=2, seed=0)
    faces = open_face_set(tmp_path / "one")
    assert list(faces.keys) == [f"id_{i:05d}/{k:03d}.jpg" for i in range(3) for k in range(2)]
    with pytest.raises(DataError, match="not empty"):
        write_synthetic(tmp_path / "one", identities=3, images_per_identity=2, seed=0)
    with pytest.raises(DataError, match="--identities is 0"):
        write_synthetic(tmp_path / "two", identities=0, images_per_identity=2, seed=0)
