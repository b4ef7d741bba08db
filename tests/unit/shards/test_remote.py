"""Remote shards against a real server that fails in every way a network can."""

import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest

from aroface.config.data import BlockOrder
from aroface.errors import DataError
from shards.dataset import ShardDataset
from shards.loader import in_background
from shards.pack import PackOptions, pack
from shards.remote import RemoteFiles, is_remote
from shards.shard_cache import ShardCache
from shards.streaming import StreamingDataset, open_stream
from tests.helpers.face_folders import write_faces
from tests.helpers.servers import serve

IMAGES_OF = {"ada": 9, "bob": 4, "cleo": 17, "dan": 2}
TOTAL = sum(IMAGES_OF.values())
ORDER = BlockOrder(block_samples=8, window_blocks=2)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    pack(write_faces(root / "faces", IMAGES_OF), root / "shards", PackOptions(samples_per_shard=8))
    return root / "shards"


def remote(address: str, attempts: int = 4) -> RemoteFiles:
    return RemoteFiles(address, attempts=attempts, first_pause_s=0.01)


def first_epoch(data: ShardDataset) -> list[int]:
    batches = data.batches(seed=2, start_position=0, num_batches=TOTAL // 4, batch_size=4, rank=0, world_size=1)
    return [sample for batch in batches for sample in batch.samples.tolist()]


def test_a_cache_gives_the_order_of_local_shards_through_every_failure(packed: Path, tmp_path: Path) -> None:
    ways = ["500", "drop", "cut", "flip"]

    def mood(name: str, number: int) -> str:
        way = ways[(len(name) + number) % 4] if number < 4 else "ok"
        return "cut" if way == "flip" and not name.endswith(".tar") else way  # only the tars carry a hash

    with serve(packed, mood) as (address, asked):
        cache = ShardCache(remote(address, attempts=5), tmp_path / "cache")
        data = ShardDataset(cache.directory, image_size=16, order=ORDER, cache=cache)
        assert first_epoch(data) == first_epoch(ShardDataset(packed, image_size=16, order=ORDER))
        assert asked["shard-000000.tar"] == 4
    assert not list(cache.directory.glob("*.tmp"))
    for tar in packed.glob("*.tar"):
        assert (cache.directory / tar.name).read_bytes() == tar.read_bytes()


def test_a_cache_is_used_again_and_by_others(packed: Path, tmp_path: Path) -> None:
    with serve(packed) as (address, asked):
        first = ShardCache(remote(address), tmp_path / "cache")
        others = [multiprocessing.get_context("fork").Process(target=first.fetch, args=(1,)) for _ in range(4)]
        for process in others:
            process.start()
        for process in others:
            process.join()
        second = ShardCache(remote(address), tmp_path / "cache")
        second.fetch(1)
        assert asked["shard-000001.tar"] == 1
        assert asked["shard-000001.idx"] == 1
        assert second.directory == first.directory


def test_a_limited_cache_makes_room(packed: Path, tmp_path: Path) -> None:
    sizes = [tar.stat().st_size for tar in packed.glob("*.tar")]
    limit = 2 * max(sizes) / 2**30
    with serve(packed) as (address, _):
        cache = ShardCache(remote(address), tmp_path / "cache", limit_gib=limit)
        data = ShardDataset(cache.directory, image_size=16, order=ORDER, cache=cache)
        assert sorted(first_epoch(data)) == list(range(TOTAL))
        assert sum(tar.stat().st_size for tar in cache.directory.glob("*.tar")) <= 2 * max(sizes)
        with pytest.raises(DataError, match="holds fewer than two shards"):
            ShardCache(remote(address), tmp_path / "tiny", limit_gib=limit / 3)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("500", "could not be read in 2 attempts: HTTP Error 500"),
        ("drop", "could not be read in 2 attempts"),
        ("cut", "could not be read in 2 attempts"),
        ("flip", "its SHA-256 differs from the manifest's"),
        ("404", "404 Not Found. Check data.shards"),
    ],
)
def test_what_stays_broken_is_told_with_the_address(packed: Path, tmp_path: Path, way: str, message: str) -> None:
    with serve(packed, lambda name, number: way if name.endswith(".tar") else "ok") as (address, _):
        cache = ShardCache(remote(address, attempts=2), tmp_path / "cache")
        with pytest.raises(DataError, match=rf"(?s)http.*shard-000002.tar.*{message}|{message}"):
            cache.fetch(2)
        assert not list(cache.directory.glob("*.tar"))


def test_an_address_without_a_set_is_told(tmp_path: Path) -> None:
    with serve(tmp_path) as (address, _), pytest.raises(DataError, match=r"manifest.json: 404"):
        ShardCache(remote(address), tmp_path / "cache")
    with pytest.raises(DataError, match="could not be read in 2 attempts"):
        ShardCache(remote("http://127.0.0.1:9", attempts=2), tmp_path / "cache")
    with pytest.raises(DataError, match="has no {name}"):
        remote("pipe:cat /data")


def test_pipes_and_files_are_addresses_too(packed: Path, tmp_path: Path) -> None:
    assert [is_remote(a) for a in ("pipe:cat {name}", "s3://b/c", "https://x", "/data", "data/x")] == [True] * 3 + [
        False
    ] * 2
    expected = first_epoch(ShardDataset(packed, image_size=16, order=ORDER))
    for number, address in enumerate((f"pipe:cat {packed}/{{name}}", f"file:{packed}")):
        cache = ShardCache(remote(address), tmp_path / str(number))
        assert first_epoch(ShardDataset(cache.directory, image_size=16, order=ORDER, cache=cache)) == expected
    with pytest.raises(DataError, match="could not be read in 2 attempts"):
        ShardCache(remote("pipe:false {name}", attempts=2), tmp_path / "false")


def stream_of(data: StreamingDataset, *, start: int, num: int, rank: int, world: int) -> list[tuple[int, int]]:
    batches = data.batches(seed=3, start_position=start, num_batches=num, batch_size=4, rank=rank, world_size=world)
    return [pair for b in batches for pair in zip(b.samples.tolist(), b.labels.tolist(), strict=True)]


def test_a_stream_keeps_what_it_promises(packed: Path) -> None:
    local = ShardDataset(packed, image_size=16)
    with serve(packed, lambda name, number: "cut" if name.endswith("1.tar") and number == 1 else "ok") as (address, _):
        data = open_stream(address, image_size=16)
        data._files = remote(address)
        data._buffer_samples = 5
        ranks = [stream_of(data, start=0, num=20, rank=rank, world=2) for rank in range(2)]
        assert ranks == [stream_of(data, start=0, num=20, rank=rank, world=2) for rank in range(2)]
        assert {len(samples) for samples in ranks} == {80}
        assert {sample for samples in ranks for sample, _ in samples} == set(range(TOTAL))
        for sample, label in ranks[0]:
            assert local.read(sample)[1] == label
        late = stream_of(data, start=2 * 40, num=5, rank=0, world=2)
        assert late != ranks[0][:20]
        assert {sample for sample, _ in ranks[0][45:52]} <= {
            s for s, _ in stream_of(data, start=80, num=20, rank=0, world=2)
        }


def test_a_stream_names_bad_samples_and_labels(packed: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    tar = broken / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[512:520] = bytes(8)
    tar.write_bytes(content)
    with serve(broken) as (address, _):
        with pytest.raises(
            DataError, match=r"shard-000000.tar: sample 0: .*bad sample 1; data.max_bad_samples allows 0"
        ):
            stream_of(open_stream(address, image_size=16), start=0, num=40, rank=0, world=1)
        patient = open_stream(address, image_size=16, max_bad_samples=10**6)
        assert len(stream_of(patient, start=0, num=40, rank=0, world=1)) == 160
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps(manifest | {"num_classes": 1}))
    with serve(broken) as (address, _), pytest.raises(DataError, match=r"has label \d; the manifest has 1 classes"):
        stream_of(open_stream(address, image_size=16, max_bad_samples=9), start=0, num=40, rank=0, world=1)


def test_closing_a_stream_leaves_no_thread(packed: Path) -> None:
    with serve(packed) as (address, _):
        before = threading.active_count()
        batches = open_stream(address, image_size=16).batches(
            seed=0, start_position=0, num_batches=10**6, batch_size=2, rank=0, world_size=1
        )
        next(batches)
        batches.close()
        assert threading.active_count() <= before + 1  # a request of the server may still be ending


def test_the_background_hands_on_items_and_errors() -> None:
    assert list(in_background(iter(range(100)), depth=2)) == list(range(100))

    def failing():
        yield 1
        raise DataError("shard 3 is gone")

    items = in_background(failing(), depth=1)
    assert next(items) == 1
    with pytest.raises(DataError, match="shard 3 is gone"):
        next(items)
