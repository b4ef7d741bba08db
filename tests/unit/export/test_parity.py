import numpy as np
import pytest

from aroface.errors import DataError
from export.parity import NUM_PARITY_FACES, sample_faces, synthetic_faces


class Faces:
    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.keys = [f"a/{i}.jpg" for i in range(count)]
        self.identities = ["a"] * count
        self._broken = broken

    def read(self, index: int) -> np.ndarray:
        if index in self._broken:
            raise DataError(f"{self.keys[index]}: cut short")
        return np.full((20, 20, 3), index % 256, np.uint8)


def test_sampled_faces_span_the_set_without_repeats() -> None:
    values = sample_faces(Faces(200), 32)[:, 0, 0, 0]
    assert len(set(values.tolist())) == NUM_PARITY_FACES
    assert values.min() < 20
    assert values.max() > 160


@pytest.mark.parametrize("count", [1, 5, 11])
def test_a_small_set_is_repeated(count: int) -> None:
    faces = sample_faces(Faces(count), 32)
    assert faces.shape == (NUM_PARITY_FACES, 32, 32, 3)
    assert set(faces[:, 0, 0, 0].tolist()) == set(range(count))


def test_unreadable_faces_are_passed_over_unless_there_is_no_other() -> None:
    assert set(sample_faces(Faces(3, frozenset({1})), 16)[:, 0, 0, 0].tolist()) == {0, 2}
    with pytest.raises(DataError, match=r"a/0\.jpg: cut short.*name another with --faces"):
        sample_faces(Faces(2, frozenset({0, 1})), 16)
    with pytest.raises(DataError, match="it is empty"):
        sample_faces(Faces(0), 16)


def test_synthetic_faces_repeat_by_seed() -> None:
    np.testing.assert_array_equal(synthetic_faces(24), synthetic_faces(24))
    assert not np.array_equal(synthetic_faces(24), synthetic_faces(24, seed=1))
