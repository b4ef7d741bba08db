"""Where tests make collections of Milvus: a file of Milvus Lite, or the server that AROFACE_TEST_MILVUS names."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from retrieval.gallery.milvus_connection import connect

__all__ = ["MilvusPlace", "milvus_place"]

_SERVER = "AROFACE_TEST_MILVUS"


@dataclass(frozen=True)
class MilvusPlace:
    uri: str
    collection: str  #: one that nobody else has; names that begin with it may be used, too
    is_lite: bool


@contextmanager
def milvus_place(kind: str, folder: Path) -> Iterator[MilvusPlace]:
    """`lite` or `server`; what tests made on a server is dropped."""
    if kind == "lite":
        pytest.importorskip("milvus_lite")
        yield MilvusPlace(str(folder / "m.db"), "faces", is_lite=True)
        return
    pytest.importorskip("pymilvus")
    uri = os.environ.get(_SERVER)
    if not uri:
        pytest.skip(f"{_SERVER} names no server of Milvus (http://127.0.0.1:19530)")
    place = MilvusPlace(uri, f"aroface_test_{uuid.uuid4().hex}", is_lite=False)
    try:
        yield place
    finally:
        client = connect(uri, os.environ.get("AROFACE_MILVUS_TOKEN", ""))
        for name in client.list_collections():
            if name.startswith(place.collection):
                client.drop_collection(name)
        client.close()
