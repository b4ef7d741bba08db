import logging
import threading

import numpy as np
import pytest

from aroface.contract import InputContract
from aroface.errors import DataError
from retrieval.extraction import embed_face_set, select_images

SIZE = 16


class MeanEmbedder:
    """Two numbers per image, of its left and right half: enough to tell images, order and mirroring apart."""

    contract = InputContract(image_size=SIZE, colour_order="rgb")
    embedding_dim = 2
    model_id = "halves"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed(self, images: np.ndarray) -> np.ndarray:
        self.contract.check_images(images)
        self.batches.append(len(images))
        halves = np.split(images.astype(np.float32), 2, axis=2)
        return np.stack([half.mean((1, 2, 3)) for half in halves], axis=1)


class Faces:
    """Image i is i + 1 on the left and 0 on the right; the images in `broken` cannot be read."""

    def __init__(self, identities: list[str], broken: tuple[int, ...] = (), side: int = SIZE) -> None:
        self.identities = identities
        self.keys = [f"{identity}/{index:02d}.jpg" for index, identity in enumerate(identities)]
        self._broken = broken
        self._side = side
        self.threads: set[str] = set()

    def read(self, index: int) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        if index in self._broken:
            raise DataError(f"{self.keys[index]}: not a readable JPEG")
        pixels = np.zeros((self._side, self._side, 3), np.uint8)
        pixels[:, : self._side // 2] = index + 1
        return pixels


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_rows_follow_the_set_whatever_the_batch_size(batch_size: int) -> None:
    faces = Faces(["a", "a", "b", "c", "c", "c", "d", "e", "e", "f", "g"])
    done: list[int] = []
    result = embed_face_set(MeanEmbedder(), faces, batch_size=batch_size, decode_threads=3, on_progress=done.append)
    embeddings = result.embeddings
    np.testing.assert_array_equal(embeddings.embeddings, [[i + 1, 0] for i in range(11)])
    assert list(embeddings.keys) == faces.keys
    assert list(embeddings.subject_ids) == faces.identities
    assert not embeddings.fte.any()
    assert done[-1] == 11
    assert done == sorted(set(done))
    assert all(name.startswith("decode") for name in faces.threads)


def test_an_unreadable_image_is_a_zero_row_marked_and_named(caplog: pytest.LogCaptureFixture) -> None:
    embedder = MeanEmbedder()
    with caplog.at_level(logging.WARNING):
        result = embed_face_set(embedder, Faces(["a", "b", "c", "d"], broken=(1, 2)), batch_size=2)
    assert result.embeddings.fte.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(result.embeddings.embeddings, [[1, 0], [0, 0], [0, 0], [4, 0]])
    assert set(result.unreadable) == {"b/01.jpg", "c/02.jpg"}
    assert "2 of 4 images cannot be read" in caplog.text
    assert "b/01.jpg: not a readable JPEG" in caplog.text
    assert embedder.batches == [1, 1]


def test_a_set_without_a_readable_image_is_refused() -> None:
    with pytest.raises(DataError, match="None of the 2 images can be read"):
        embed_face_set(MeanEmbedder(), Faces(["a", "b"], broken=(0, 1)))
    with pytest.raises(DataError, match="no image to embed"):
        embed_face_set(MeanEmbedder(), Faces(["a"]), indices=[])


def test_flip_sum_adds_the_mirror_image() -> None:
    result = embed_face_set(MeanEmbedder(), Faces(["a", "b"]), flip="sum")
    np.testing.assert_array_equal(result.embeddings.embeddings, [[1, 1], [2, 2]])


def test_images_are_transformed_then_resized_in_the_order_asked_for() -> None:
    seen = []

    def brighten(pixels: np.ndarray, key: str) -> np.ndarray:
        seen.append((key, pixels.shape))
        return pixels + np.uint8(10)

    faces = Faces(["a", "b", "c"], side=64)
    result = embed_face_set(MeanEmbedder(), faces, indices=[2, 0], transform=brighten, decode_threads=1)
    np.testing.assert_array_equal(result.embeddings.embeddings, [[13, 10], [11, 10]])
    assert seen == [("c/02.jpg", (64, 64, 3)), ("a/00.jpg", (64, 64, 3))]


def test_a_model_that_has_diverged_is_named_with_the_image() -> None:
    class Diverged(MeanEmbedder):
        def embed(self, images: np.ndarray) -> np.ndarray:
            embeddings = super().embed(images)
            embeddings[embeddings == 2] = np.nan
            return embeddings

    with pytest.raises(DataError, match=r"halves.*not finite for b/01\.jpg.*earlier checkpoint"):
        embed_face_set(Diverged(), Faces(["a", "b", "c"]))


def test_an_error_of_our_own_is_not_taken_for_a_bad_image() -> None:
    class Buggy(Faces):
        def read(self, index: int) -> np.ndarray:
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        embed_face_set(MeanEmbedder(), Buggy(["a"]))


def test_first_and_rest_part_the_set() -> None:
    faces = Faces(["b", "a", "b", "a", "c"])
    faces.keys = ["b/2", "a/1", "b/1", "a/2", "c/1"]
    assert select_images(faces, "first") == [1, 2, 4]
    assert select_images(faces, "rest") == [0, 3]
    assert select_images(faces, "all") == [0, 1, 2, 3, 4]
