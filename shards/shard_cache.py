"""Local copies of remote shards: whole, checked against the manifest, shared by all processes of a machine."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aroface.errors import DataError
from aroface.files import sha256_of
from aroface.locks import try_lock
from shards.manifest import IDENTITIES_NAME, MANIFEST_NAME, Manifest, read_manifest
from shards.remote import RemoteFiles

__all__ = ["ShardCache"]

logger = logging.getLogger(__name__)


class ShardCache:
    """A folder that fills with the shards of one remote set as they are asked for.

    A shard appears under its name only when it is whole and its SHA-256 is that of the manifest. Processes that want
    the same shard wait for the one that fetches it. With a limit, the shards used longest ago make room; a process that
    has one of them mapped keeps reading it.

    Args:
        files: the remote set.
        folder: of all caches; this set gets a folder of its own in it, named after its manifest.
        limit_gib: largest size of the tars in it; None: no limit.

    Raises:
        DataError: the address has no manifest or index, or cannot be reached.
    """

    def __init__(self, files: RemoteFiles, folder: Path, *, limit_gib: float | None = None) -> None:
        self._files = files
        folder.mkdir(parents=True, exist_ok=True)
        with try_lock(folder / ".opening.lock", wait=True):
            incoming = folder / ".incoming"
            incoming.mkdir(exist_ok=True)
            files.download(MANIFEST_NAME, incoming / MANIFEST_NAME)
            self.manifest: Manifest = read_manifest(incoming)
            self.directory = folder / sha256_of(incoming / MANIFEST_NAME)[:16]
            self.directory.mkdir(exist_ok=True)
            (incoming / MANIFEST_NAME).replace(self.directory / MANIFEST_NAME)
            names = [IDENTITIES_NAME, *(Path(entry.name).with_suffix(".idx").name for entry in self.manifest.shards)]
            for name in names:
                if not (self.directory / name).is_file():
                    files.download(name, self.directory / name)
        self._limit_bytes = None if limit_gib is None else round(limit_gib * 2**30)
        largest = max(entry.bytes for entry in self.manifest.shards)
        if self._limit_bytes is not None and self._limit_bytes < 2 * largest:
            raise DataError(
                f"data.cache_gib = {limit_gib} holds fewer than two shards of {largest / 2**30:.3g} GiB; raise it."
            )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._asked: set[int] = set()
        self._lock = threading.Lock()

    def fetch(self, shard: int) -> None:
        """Make sure that a shard is there; waits for it."""
        entry = self.manifest.shards[shard]
        path = self.directory / entry.name
        with try_lock(self.directory / f".{entry.name}.lock", wait=True):
            if path.is_file() and path.stat().st_size == entry.bytes:
                path.touch()
                return
            self._make_room(entry.bytes)
            self._files.download(entry.name, path, sha256=entry.sha256, size=entry.bytes)
        logger.info("Fetched %s.", self._files.url(entry.name))

    def fetch_ahead(self, shards: list[int]) -> None:
        """Begin to fetch shards in the background, one after the other; failures show when the shard is needed."""
        with self._lock:
            new = [shard for shard in shards if shard not in self._asked]
            self._asked.update(new)
        for shard in new:
            self._pool.submit(self._fetch_quietly, shard)

    def _fetch_quietly(self, shard: int) -> None:
        try:
            self.fetch(shard)
        except DataError as error:
            logger.warning("%s", error)
        finally:
            with self._lock:
                self._asked.discard(shard)

    def _make_room(self, needed: int) -> None:
        if self._limit_bytes is None:
            return
        tars = sorted(self.directory.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
        used = sum(path.stat().st_size for path in tars)
        while tars and used + needed > self._limit_bytes:
            oldest = tars.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink(missing_ok=True)
