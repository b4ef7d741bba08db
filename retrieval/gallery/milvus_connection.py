"""Connections to Milvus and Milvus Lite, which say what goes wrong by exceptions alone."""

import logging.config
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aroface.errors import ConfigError, DataError

__all__ = ["connect", "connect_to", "is_lite"]

_OLDEST = (2, 3)


def connect(uri: str, token: str) -> Any:
    """A `pymilvus.MilvusClient`.

    Args:
        uri: file of Milvus Lite, or address of a server.
        token: of the server.

    Raises:
        ConfigError: pymilvus is missing, the file cannot be opened, nobody answers, or a server older than 2.3.
    """
    try:
        with _logging_left_alone():
            from pymilvus import MilvusClient
            from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise ConfigError("Milvus needs the packages of `pip install aroface[milvus]`.") from error
    # What they log as errors is raised as well, and told by us; that Milvus Lite starts and stops is nobody's concern.
    for name in ("pymilvus", "milvus_lite", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = MilvusClient(uri, token=token)
        version = str(client.get_server_version())
    except MilvusException as error:
        if "://" not in uri:
            raise ConfigError(
                f"Milvus Lite cannot open {uri}: {error}. The file is damaged, no database of Milvus Lite, or in use."
            ) from error
        raise ConfigError(f"Milvus at {uri} does not answer: {error}. Check the address and the token.") from error
    found = re.search(r"(\d+)\.(\d+)", version)
    if not is_lite(version) and found and tuple(map(int, found.groups())) < _OLDEST:
        client.close()
        raise ConfigError(
            f"Milvus at {uri} is {version}; 2.3 or newer is needed, which replaces entries by their id. Upgrade the "
            "server, or use another one."
        )
    return client


def connect_to(uri: str, token: str, collection: str) -> Any:
    """As `connect`, for a collection that is there; Milvus Lite alone would make a file that is missing.

    Raises:
        DataError: there is no such collection.
        ConfigError: as `connect`.
    """
    if "://" in uri or Path(uri).exists():
        client = connect(uri, token)
        if client.has_collection(collection):
            return client
        client.close()
    raise DataError(
        f"There is no collection {collection} at {uri}; make it with `aroface gallery build {uri} --milvus`."
    )


def is_lite(version: str) -> bool:
    """Whether a version is that of Milvus Lite; that of a server may end in `-lite` (the package `milvus`)."""
    return version.startswith("milvus_lite")


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """While pymilvus is imported: it configures the logging of the process, which closes the handlers of everyone."""
    configure = logging.config.dictConfig
    logging.config.dictConfig = lambda config: None
    try:
        yield
    finally:
        logging.config.dictConfig = configure
