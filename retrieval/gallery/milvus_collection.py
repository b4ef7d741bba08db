"""A collection of Milvus as a gallery needs it: its fields, what is kept in its properties, and when it is complete."""

import json
import logging
import time
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from aroface.contract import InputContract
from aroface.errors import DataError
from retrieval.gallery.milvus_kinds import Effort, index_of
from retrieval.gallery.records import Calibration, IndexKind, Recall

__all__ = [
    "MAX_ID",
    "Settings",
    "create_collection",
    "keep_calibration",
    "keep_settings",
    "kept",
    "make_index",
    "wait_until_indexed",
]

MAX_ID = 512  #: bytes of an id
_SETTINGS, _CALIBRATION = "aroface.gallery", "aroface.calibration"  # properties of the collection, as JSON
_POLL_S = 0.5
_TELL_S = 30.0
_STALL_S = 3600.0  # rows are counted by whole segments, and one of 512 MB takes many minutes on few cores

logger = logging.getLogger(__name__)


class Settings(BaseModel):
    """What a gallery keeps in the properties of its collection."""

    index: IndexKind = Field(description="how it is searched")
    dimension: int = Field(ge=1, description="D of the embeddings")
    model_id: str | None = Field(description="model that made the embeddings, when known")
    contract: InputContract | None = Field(description="what that model sees, when known")
    params: dict[str, int] = Field(default={}, description="of the index")
    effort: int = Field(default=0, ge=0, description="nprobe of a segment (ivf) or ef (hnsw); 0: what Milvus chooses")
    rescored: int = Field(default=1, ge=1, description="candidates compared again for each place of a list")
    recall: Recall | None = Field(default=None, description="measured against exact search when it was built")

    @property
    def search(self) -> Effort:
        """How much of the index a search looks at."""
        return Effort(self.index, self.effort, self.rescored)

    @property
    def how(self) -> str:
        """The same in words; empty for an exact search."""
        if self.index == "flat":
            return ""
        name, _ = index_of(self.index, self.dimension)
        built = "".join(f", {key} {value}" for key, value in self.params.items())
        what = "ef" if self.index == "hnsw" else "nprobe"
        return f"{name}{built}, {what} {self.effort or 'of Milvus'}, {self.rescored} rescored per place"


def create_collection(client: Any, collection: str, settings: Settings, consistency: str) -> None:
    """Make an empty collection and load it."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("entry_id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID)
    schema.add_field("subject_id", DataType.VARCHAR, max_length=MAX_ID)
    schema.add_field("norm", DataType.FLOAT)
    schema.add_field("number", DataType.INT64)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=settings.dimension)
    client.create_collection(
        collection,
        schema=schema,
        index_params=_index_params(client, settings),
        consistency_level=consistency,
        properties={_SETTINGS: settings.model_dump_json()},
    )


def make_index(client: Any, collection: str, settings: Settings) -> None:
    """Put another index in the place of the present one."""
    client.release_collection(collection)
    client.drop_index(collection, "embedding")
    client.create_index(collection, _index_params(client, settings), sync=False)
    client.load_collection(collection)


def _index_params(client: Any, settings: Settings) -> Any:
    indexes = client.prepare_index_params()
    name, _ = index_of(settings.index, settings.dimension)
    # As one value: the client passes others on one by one, which a server understands and Milvus Lite ignores.
    indexes.add_index("embedding", index_type=name, metric_type="IP", params={"params": settings.params})
    return indexes


def kept(client: Any, collection: str, uri: str) -> tuple[Settings, tuple[Calibration, ...]]:
    """What the properties of a collection say.

    Raises:
        DataError: a collection of somebody else.
    """
    try:
        properties = dict(client.describe_collection(collection)["properties"])
        settings = Settings.model_validate_json(properties[_SETTINGS])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Collection {collection} at {uri} was not made by aroface; name another one with `--collection`."
        ) from error
    points = json.loads(properties.get(_CALIBRATION, "[]"))
    return settings, tuple(Calibration.model_validate(point) for point in points)


def keep_settings(client: Any, collection: str, settings: Settings) -> None:
    """Write the settings."""
    client.alter_collection_properties(collection, properties={_SETTINGS: settings.model_dump_json()})


def keep_calibration(client: Any, collection: str, points: tuple[Calibration, ...]) -> None:
    """Write the thresholds."""
    text = json.dumps([point.model_dump(mode="json") for point in points])
    client.alter_collection_properties(collection, properties={_CALIBRATION: text})


def wait_until_indexed(client: Any, collection: str) -> None:
    """Wait until every entry lies in a segment that will not grow, and is searched through its index.

    Before, new rows are compared one by one, and a search tells nothing about the index. Small segments are left for
    Milvus to join: asked for it by this client, a server 2.3 compacts the collections of everyone.

    What is done is logged now and then: an index of 10^9 entries takes hours.

    Raises:
        DataError: Milvus could not make an index, or got no further for an hour.
    """
    client.flush(collection)
    logger.info("Collection %s: Milvus makes its indexes.", collection)
    done, progressed = "", time.monotonic()
    told = progressed
    while True:
        state = client.describe_index(collection, "embedding")
        if state.get("state") == "Failed":
            raise DataError(f"Milvus could not make the index of {collection}: {state.get('index_state_fail_reason')}")
        pending = int(state.get("pending_index_rows") or 0)
        if state.get("state", "Finished") == "Finished" and not pending:
            break
        now, before = time.monotonic(), done
        done = f"{state.get('indexed_rows', '?')} of {state.get('total_rows', '?')} rows indexed, {pending} wait"
        if done != before:
            progressed = now
        elif now - progressed > _STALL_S:
            raise DataError(
                f"Milvus makes no progress with the index of {collection}: {done} since {_STALL_S / 60:.0f} minutes. "
                "See in its log whether index nodes run and have cores and memory, then build again; ivf-sq8 is made "
                "sooner than ivf-pq and hnsw, and flat needs no index."
            )
        if now - told > _TELL_S:
            told = now
            logger.info("Collection %s: %s.", collection, done)
        time.sleep(_POLL_S)
    client.release_collection(collection)  # loaded anew, it is searched through the indexes
    client.load_collection(collection)
