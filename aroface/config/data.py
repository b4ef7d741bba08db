"""Settings of the training data."""

from typing import Annotated, Literal

from pydantic import Field

from aroface.config.section import Section
from aroface.contract import ColourOrder

__all__ = [
    "AugmentConfig",
    "BalancedOrder",
    "BlockOrder",
    "DataConfig",
    "OrderConfig",
    "RandomOrder",
    "ShardMix",
    "WeightedOrder",
]


class AugmentConfig(Section):
    """Random changes on the device, each with its probability per image; 0 switches it off."""

    flip: float = Field(0.5, ge=0, le=1, description="mirror left-right")
    low_resolution: float = Field(0.0, ge=0, le=1, description="shrink to 20-100 % of the side and back")
    photometric: float = Field(0.0, ge=0, le=1, description="brightness, contrast and saturation")
    crop: float = Field(0.0, ge=0, le=1, description="keep a random 20-100 % of the area at its place, black elsewhere")
    erase: float = Field(0.0, ge=0, le=1, description="black rectangle of 2-25 % of the area")
    grey: float = Field(0.0, ge=0, le=1, description="drop the colour")


class RandomOrder(Section):
    """Every sample once per epoch, in any order: for memory and local disks."""

    kind: Literal["random"] = "random"


class BlockOrder(Section):
    """Every sample once per epoch, read in blocks of neighbours: for network mounts, spinning disks, remote shards."""

    kind: Literal["block"] = "block"
    block_samples: int = Field(1024, ge=1, description="consecutive samples of a block; one sequential read")
    window_blocks: int = Field(16, ge=1, description="blocks whose samples are shuffled together")


class BalancedOrder(Section):
    """Every identity equally often, its images in turn."""

    kind: Literal["balanced"] = "balanced"


class WeightedOrder(Section):
    """Identities drawn by weight, with replacement."""

    kind: Literal["weighted"] = "weighted"
    power: float = Field(0.5, ge=0, le=2, description="weight = images of the identity ** power; 1 natural, 0 even")
    weights: str | None = Field(None, description="CSV of identity,weight in place of the power; others have 1")


OrderConfig = Annotated[RandomOrder | BlockOrder | BalancedOrder | WeightedOrder, Field(discriminator="kind")]


class ShardMix(Section):
    """One of several shard sets that are trained on together; its classes are its own."""

    shards: str = Field(description="directory or URL")
    ratio: float = Field(gt=0, description="share of the stream, relative to the other sets")


class DataConfig(Section):
    """The training shards."""

    shards: str | list[ShardMix] = Field(
        description="directory written by `aroface pack`, its http(s)://, s3:// or pipe: address, or a list of "
        "{shards, ratio}"
    )
    order: OrderConfig | None = Field(None, description="null: random on local disks, block for remote shards")
    cache: str | None = Field(
        None, description="folder for copies of remote shards; null: stream them, order not exact"
    )
    cache_gib: float | None = Field(None, gt=0, description="largest size of the cache; null: no limit")
    colour_order: ColourOrder = Field(description="channel order that the model is trained with")
    workers: int | None = Field(
        None, ge=1, le=64, description="decoding threads per rank; null: 1, beside a GPU up to 4 of the rank's cores"
    )
    max_bad_samples: int = Field(0, ge=0, description="unreadable samples tolerated per run before it stops")
    min_images_per_identity: int = Field(1, ge=1, description="identities with fewer images are left out")
    augment: AugmentConfig = AugmentConfig()
