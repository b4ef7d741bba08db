"""`data.shards` in all its forms, through the command line."""

from pathlib import Path

import pytest

from aroface.config.load import load_config
from aroface.config.schema import TrainConfig
from aroface.errors import ConfigError
from launch import training_data
from launch.cli import main
from launch.training_data import open_training_data
from shards.dataset import ShardDataset
from shards.mixture import Mixture
from shards.streaming import StreamingDataset
from tests.helpers.servers import serve

TINY = Path(__file__).parents[2] / "configs" / "smoke" / "tiny.yaml"


def opened(*settings: str):
    config = load_config(TINY, TrainConfig, list(settings))
    return open_training_data(config.data, image_size=config.model.image_size)


def test_every_form_is_opened(drawn_shards: Path, tmp_path: Path) -> None:
    local = opened(f"data.shards={drawn_shards}", "data.order={kind: balanced}")
    assert isinstance(local, ShardDataset)
    mixed = opened(f"data.shards=[{{shards: {drawn_shards}, ratio: 2}}, {{shards: {drawn_shards}, ratio: 1}}]")
    assert isinstance(mixed, Mixture)
    assert mixed.num_classes == 2 * local.num_classes
    with serve(drawn_shards) as (address, asked):
        assert isinstance(opened(f"data.shards={address}"), StreamingDataset)
        cached = opened(f"data.shards={address}", f"data.cache={tmp_path}")
        assert isinstance(cached, ShardDataset)
        assert cached.fingerprint == local.fingerprint
        assert not any(name.endswith(".tar") for name in asked), "tars are fetched when they are needed"


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "expected"),
    [("cpu", 16, 1, 1), ("cuda:0", 16, 1, 4), ("cuda:0", 16, 8, 1), ("cuda:1", 24, 8, 2), ("cuda:0", 1, 2, 1)],
)
def test_decoding_threads_follow_the_cores_that_a_rank_has(
    monkeypatch: pytest.MonkeyPatch, drawn_shards: Path, device: str, cores: int, ranks: int, expected: int
) -> None:
    monkeypatch.setattr(training_data, "own_device", lambda: device)
    monkeypatch.setattr(training_data.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    counts = [opened(f"data.shards={drawn_shards}", *settings).workers for settings in ((), ("data.workers=7",))]
    assert counts == [expected, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.shards=[]"], "data.shards is an empty list"),
        (["data.shards=[{shards: 'http://x', ratio: 1}]"], "a stream cannot be mixed"),
        (["data.shards=http://x", "data.order={kind: block}"], "data.order cannot be kept for streamed shards"),
        (["data.shards=http://x", "data.min_images_per_identity=2"], "data.min_images_per_identity cannot be kept"),
        (["data.shards=[{shards: a, ratio: 0}]"], "ratio"),
        (["data.order={kind: sorted}"], "random"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(*settings)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_training_from_an_address(drawn_shards: Path, tmp_path: Path, capsys, cached: bool) -> None:
    settings = [f"data.cache={tmp_path / 'cache'}"] if cached else []
    with serve(drawn_shards) as (address, _):
        run = ["--run", str(tmp_path / "run"), "--check"]
        assert main(["train", str(TINY), f"data.shards={address}", *settings, *run]) == 0
    assert "check passed" in capsys.readouterr().out
