import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aroface.config.data import BalancedOrder, BlockOrder, OrderConfig, RandomOrder, WeightedOrder
from aroface.errors import DataError
from shards.dataset import ShardDataset
from shards.pack import PackOptions, pack
from tests.helpers.face_folders import write_faces

IMAGES_OF = {"ada": 5, "bob": 1, "cleo": 7, "dan": 2, "eve": 4}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    pack(write_faces(root / "faces", IMAGES_OF), root / "shards", PackOptions(samples_per_shard=8))
    return root / "shards"


@pytest.fixture
def broken(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "broken"))


def members(data: ShardDataset, sample: int) -> range:
    """As many as the identity of a sample has images."""
    return range(IMAGES_OF[data.member_name(sample).split("/")[0]])


def stream(data: ShardDataset, *, start: int, num: int, batch: int, world: int) -> list[int]:
    """Samples in global order, woven together from all ranks."""
    ranks = [
        list(data.batches(seed=5, start_position=start, num_batches=num, batch_size=batch, rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {num}
    return [
        int(ranks[rank][step].samples[lane]) for step in range(num) for lane in range(batch) for rank in range(world)
    ]


ORDERS = [RandomOrder(), BlockOrder(block_samples=3, window_blocks=2), BalancedOrder(), WeightedOrder()]


@given(
    batch=st.integers(1, 6),
    world=st.integers(1, 4),
    skip=st.integers(0, 5),
    workers=st.integers(1, 3),
    least=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
)
@settings(max_examples=60, deadline=None)
def test_order_does_not_depend_on_ranks_batches_or_resume(
    packed: Path, batch: int, world: int, skip: int, workers: int, least: int, order: OrderConfig
) -> None:
    data = ShardDataset(packed, image_size=16, workers=workers, min_images_per_identity=least, order=order)
    n = data.num_samples
    steps = -(-3 * n // (batch * world))
    reference = data.samples_at(np.arange(steps * batch * world), seed=5).tolist()
    assert stream(data, start=0, num=steps, batch=batch, world=world) == reference
    start = min(skip, steps - 1) * batch * world
    rest = stream(data, start=start, num=steps - min(skip, steps - 1), batch=batch, world=world)
    assert rest == reference[start:]
    kept = sorted(sample for sample in range(19) if len(members(data, sample)) >= least)
    assert len(kept) == n
    if isinstance(order, RandomOrder | BlockOrder):
        for epoch in range(3):
            assert sorted(reference[epoch * n : (epoch + 1) * n]) == kept
    assert set(reference) <= set(kept)


def test_pixels_and_labels_belong_to_the_sample(packed: Path) -> None:
    data = ShardDataset(packed, image_size=16, workers=2)
    for batch in data.batches(seed=0, start_position=0, num_batches=4, batch_size=5, rank=0, world_size=1):
        for image, label, sample in zip(batch.images, batch.labels, batch.samples, strict=True):
            name = data.member_name(int(sample))
            assert sorted(IMAGES_OF)[int(label)] == name.split("/")[0]
            original = packed.parent / "faces" / name
            assert bytes(data.read(int(sample))[0]) == original.read_bytes()
            assert image.shape == (16, 16, 3)


def test_memory_is_used_again_but_never_under_a_batch_that_somebody_holds(packed: Path) -> None:
    data = ShardDataset(packed, image_size=16)
    steps = {"seed": 0, "start_position": 0, "num_batches": 12, "batch_size": 4, "rank": 0, "world_size": 1}
    kept = [batch.images for batch in data.batches(**steps)]
    views = [batch.images[1:2] for batch in data.batches(**steps)]  # a part of a batch holds all of it
    places, copies = set(), []
    for batch in data.batches(**steps):
        places.add(batch.images.data_ptr())
        copies.append(batch.images.clone())
    assert all(map(torch.equal, kept, copies))
    assert all(torch.equal(view, copy[1:2]) for view, copy in zip(views, copies, strict=True))
    assert len({images.data_ptr() for images in kept}) == 12
    assert len(places) < 12


def test_small_identities_are_left_out_and_classes_renumbered(packed: Path) -> None:
    data = ShardDataset(packed, image_size=8, min_images_per_identity=4)
    assert (data.num_classes, data.num_samples) == (3, 16)
    (batch,) = data.batches(seed=0, start_position=0, num_batches=1, batch_size=16, rank=0, world_size=1)
    assert np.bincount(batch.labels.numpy()).tolist() == [5, 7, 4]
    assert batch.images.shape == (16, 8, 8, 3)


def test_leaving_nothing_is_refused(packed: Path) -> None:
    with pytest.raises(DataError, match="largest identity has 7 images"):
        ShardDataset(packed, image_size=8, min_images_per_identity=8)


def damage(directory: Path, sample: int) -> str:
    """Overwrite the bytes of one image; returns its name in the tar."""
    data = ShardDataset(directory, image_size=16)
    name = data.describe(sample)
    shard, key = name.split(": ")
    tar = directory / shard
    content = tar.read_bytes()
    start = content.index(key.encode()) + 512
    tar.write_bytes(content[:start] + b"\0" * 64 + content[start + 64 :])
    return name


def test_a_bad_image_is_named_over_budget(broken: Path) -> None:
    name = damage(broken, 9)
    data = ShardDataset(broken, image_size=16)
    batches = data.batches(seed=0, start_position=0, num_batches=8, batch_size=4, rank=0, world_size=1)
    with pytest.raises(DataError, match=f"{name}.*data.max_bad_samples allows 0"):
        list(batches)


def test_a_bad_image_is_replaced_within_budget(broken: Path) -> None:
    damage(broken, 9)
    data = ShardDataset(broken, image_size=16, max_bad_samples=1, min_images_per_identity=2)
    epochs = list(data.batches(seed=0, start_position=0, num_batches=9, batch_size=4, rank=0, world_size=1))
    assert all(len(batch.images) == 4 for batch in epochs)
    assert data.num_bad == 1
    assert all(int(batch.labels.min()) >= 0 and int(batch.labels.max()) < data.num_classes for batch in epochs)


def test_index_of_another_tar_is_refused(broken: Path) -> None:
    shutil.copy(broken / "shard-000001.idx", broken / "shard-000000.idx")
    with pytest.raises(DataError, match="belongs to another tar"):
        ShardDataset(broken, image_size=16)


def test_missing_index_truncated_tar_and_label_out_of_range(broken: Path) -> None:
    index = broken / "shard-000000.idx"
    content = index.read_bytes()
    index.write_bytes(content[:-4] + b"\x63\0\0\0")
    with pytest.raises(DataError, match=r"shard-000000.tar: .*\.jpg has label 99; the manifest has 5 classes"):
        ShardDataset(broken, image_size=16)
    index.write_bytes(content[:-4])
    with pytest.raises(DataError, match="not what 8 samples take"):
        ShardDataset(broken, image_size=16)
    index.unlink()
    with pytest.raises(DataError, match=r"shard-000000.idx is missing"):
        ShardDataset(broken, image_size=16)
    index.write_bytes(content)
    tar = broken / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    with pytest.raises(DataError, match=r"shard-000001.tar is .* cut short or replaced"):
        ShardDataset(broken, image_size=16)


def test_closing_early_stops_the_threads(packed: Path) -> None:
    import threading

    batches = ShardDataset(packed, image_size=16, workers=2).batches(
        seed=0, start_position=0, num_batches=1000, batch_size=4, rank=0, world_size=1
    )
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
