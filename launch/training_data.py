"""The training images that a configuration names: local shards, remote ones, or several sets mixed."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.config.data import BlockOrder, DataConfig
from aroface.devices import local_ranks, own_device
from aroface.errors import ConfigError

if TYPE_CHECKING:
    from aroface.types import TrainingData
    from shards.dataset import ShardDataset
    from shards.shard_cache import ShardCache

__all__ = ["open_training_data"]

_SHARDS_SHUFFLED = 4
#: One decodes 7,000 to 10,000 faces of 112 px a second; what is not wanted sleeps.
_MOST_DECODING_THREADS = 4


def open_training_data(config: DataConfig, *, image_size: int) -> "TrainingData":
    """Open `data.shards`.

    Args:
        config: the section `data`.
        image_size: side of the delivered images in pixels.

    Raises:
        ArofaceError: shards that are missing, damaged or unreachable; settings that do not go together.
    """
    from shards.mixture import Mixture
    from shards.remote import is_remote

    if isinstance(config.shards, str):
        if is_remote(config.shards) and config.cache is None:
            return _stream(config.shards, config, image_size)
        return _open(config.shards, config, image_size)
    if not config.shards:
        raise ConfigError("data.shards is an empty list; name at least one {shards, ratio}.")
    for part in config.shards:
        if is_remote(part.shards) and config.cache is None:
            raise ConfigError(
                f"data.shards: {part.shards} would be streamed, and a stream cannot be mixed with other sets; set "
                "data.cache to a local folder."
            )
    parts = [_open(part.shards, config, image_size) for part in config.shards]
    return Mixture(parts, [part.ratio for part in config.shards])


def _open(address: str, config: DataConfig, image_size: int) -> "ShardDataset":
    from shards.dataset import ShardDataset
    from shards.remote import RemoteFiles, is_remote
    from shards.shard_cache import ShardCache

    cache = None
    if is_remote(address):
        assert config.cache is not None  # noqa: S101 - the caller streams otherwise
        cache = ShardCache(RemoteFiles(address), Path(config.cache), limit_gib=config.cache_gib)
    return ShardDataset(
        Path(address) if cache is None else cache.directory,
        image_size=image_size,
        min_images_per_identity=config.min_images_per_identity,
        workers=config.workers or _decoding_threads(),
        max_bad_samples=config.max_bad_samples,
        order=config.order or (None if cache is None else _order_of_shards(cache)),
        cache=cache,
    )


def _decoding_threads() -> int:
    """On a CPU the training has the cores; beside a GPU all are free but the one that launches its work."""
    if own_device() == "cpu":
        return 1
    return max(1, min(_MOST_DECODING_THREADS, len(os.sched_getaffinity(0)) // local_ranks() - 1))


def _order_of_shards(cache: "ShardCache") -> BlockOrder:
    """Blocks as long as shards, so that training begins when the first few have arrived."""
    return BlockOrder(
        block_samples=max(entry.samples for entry in cache.manifest.shards), window_blocks=_SHARDS_SHUFFLED
    )


def _stream(address: str, config: DataConfig, image_size: int) -> "TrainingData":
    from shards.streaming import open_stream

    if config.order is not None or config.min_images_per_identity > 1:
        setting = "data.order" if config.order is not None else "data.min_images_per_identity"
        raise ConfigError(
            f"{setting} cannot be kept for streamed shards, whose order is that of the stream; set data.cache to a "
            "local folder for exact orders."
        )
    return open_stream(address, image_size=image_size, max_bad_samples=config.max_bad_samples)
