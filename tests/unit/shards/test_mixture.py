"""Several sets in one stream: exact ratios, every set in its own exact order, labels side by side."""

import numpy as np
import pytest

from aroface.errors import DataError
from shards.dataset import ShardDataset
from shards.mixture import Mixture
from shards.pack import PackOptions, pack
from tests.helpers.face_folders import write_faces


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[ShardDataset]:
    root = tmp_path_factory.mktemp("mix")
    for name, images in (("large", {"ada": 9, "bob": 4, "cleo": 7}), ("small", {"dan": 2, "eve": 3})):
        pack(write_faces(root / "faces" / name, images), root / name, PackOptions(samples_per_shard=6))
    return [ShardDataset(root / "large", image_size=16), ShardDataset(root / "small", image_size=16, workers=2)]


def test_ratios_hold_in_every_block_and_each_set_keeps_its_order(parts: list[ShardDataset]) -> None:
    mixture = Mixture(parts, [3, 1])
    stream = mixture.samples_at(np.arange(5000), seed=7)
    from_large = stream < 20
    for block in from_large.reshape(5, 1000):
        assert block.sum() == 750
    places, (large, small) = mixture._places(np.arange(5000), 7), parts
    own = places[1][from_large]
    assert own.tolist() == list(range(3750)), "in its own order, without a gap"
    assert (stream[from_large] == large.samples_at(own, seed=7)).all()
    assert (stream[~from_large] - 20 == small.samples_at(places[1][~from_large], seed=7)).all()


def test_labels_follow_one_another_and_pixels_belong_to_them(parts: list[ShardDataset]) -> None:
    mixture = Mixture(parts, [1, 1])
    assert (mixture.num_classes, mixture.num_samples) == (5, 25)
    seen = set()
    for batch in mixture.batches(seed=0, start_position=0, num_batches=10, batch_size=10, rank=0, world_size=1):
        for image, label, sample in zip(batch.images, batch.labels.tolist(), batch.samples.tolist(), strict=True):
            part, start, first = (parts[0], 0, 0) if sample < 20 else (parts[1], 20, 3)
            alone = np.empty((1, 16, 16, 3), np.uint8), np.empty(1, np.int64)
            part.fill(np.array([sample - start]), *alone)
            assert (image.numpy() == alone[0][0]).all()
            assert label == alone[1][0] + first
            seen.add(sample)
    assert seen == set(range(25))
    assert mixture.describe(21).startswith("small: shard-000000.tar: ")


def test_ranks_and_resumes_see_one_order(parts: list[ShardDataset]) -> None:
    mixture = Mixture(parts, [2, 5])

    def woven(start: int, num: int, batch: int, world: int) -> list[int]:
        ranks = [
            [
                b.samples
                for b in mixture.batches(
                    seed=1, start_position=start, num_batches=num, batch_size=batch, rank=r, world_size=world
                )
            ]
            for r in range(world)
        ]
        return [int(ranks[r][s][i]) for s in range(num) for i in range(batch) for r in range(world)]

    reference = mixture.samples_at(np.arange(1200), seed=1).tolist()
    assert woven(0, 100, 12, 1) == woven(0, 100, 4, 3) == reference
    assert woven(600, 50, 6, 2) == reference[600:]


def test_the_fingerprint_covers_sets_and_ratios(parts: list[ShardDataset]) -> None:
    prints = {Mixture(p, r).fingerprint for p, r in ((parts, [1, 1]), (parts, [2, 1]), (parts[::-1], [1, 1]))}
    assert len(prints) == 3


def test_a_ratio_that_rounds_to_nothing_is_refused(parts: list[ShardDataset]) -> None:
    with pytest.raises(DataError, match="ratio of small is below 1/1000"):
        Mixture(parts, [1, 1e-5])
