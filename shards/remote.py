"""Files of a shard directory that lies elsewhere, at http(s)://, s3://, pipe: or file: addresses.

http is read by the standard library; every other scheme goes through `webdataset.gopen`, so that s3:// runs `aws s3 cp`
and `pipe:COMMAND` runs a command. In a pipe address `{name}` stands for the name of the file: `pipe:ssh host cat
/data/set/{name}`.
"""

import errno
import hashlib
import http.client
import logging
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO

from aroface.errors import DataError
from aroface.files import atomic_path

__all__ = ["RemoteFiles", "is_remote"]

_SCHEMES = ("http://", "https://", "s3://", "gs://", "file:", "pipe:")
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.5
_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20

logger = logging.getLogger(__name__)


def is_remote(address: str) -> bool:
    """The address is no path of this machine."""
    return address.startswith(_SCHEMES)


class RemoteFiles:
    """The files below one address.

    Args:
        address: of the directory.
        attempts: how often a file is asked for before giving up, with pauses that double.
        first_pause_s: before the second attempt, seconds.
    """

    def __init__(self, address: str, *, attempts: int = _ATTEMPTS, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        if address.startswith("pipe:") and "{name}" not in address:
            raise DataError(
                f"data.shards = {address} has no {{name}}, which stands for the file that is asked for; write for "
                "example pipe:ssh host cat /data/set/{name}"
            )
        self.address = address
        self._attempts = attempts
        self._first_pause_s = first_pause_s

    def url(self, name: str) -> str:
        """Address of one file."""
        if self.address.startswith("pipe:"):
            return self.address.replace("{name}", name)
        return f"{self.address.rstrip('/')}/{name}"

    def open(self, name: str) -> IO[bytes]:
        """A stream of one file, not seekable; one attempt."""
        url = self.url(name)
        if url.startswith(("http://", "https://")):
            response: IO[bytes] = urllib.request.urlopen(url, timeout=_TIMEOUT_S)  # noqa: S310 - the scheme is checked
            return response
        import webdataset

        stream: IO[bytes] = webdataset.gopen(url.removeprefix("file://").removeprefix("file:"), "rb")
        return stream

    def download(self, name: str, path: Path, *, sha256: str | None = None, size: int | None = None) -> None:
        """Copy one file to `path`, atomically; nothing is there before all of it is and the checks hold.

        Args:
            name: of the file.
            path: where it goes.
            sha256: what its hash must be.
            size: what its size must be in bytes.

        Raises:
            DataError: it is not there, or arrives damaged time after time.
        """

        def fetch() -> None:
            digest, total = hashlib.sha256(), 0
            with atomic_path(path) as temporary:
                with temporary.open("wb") as file, closing(self.open(name)) as stream:
                    while chunk := stream.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        total += len(chunk)
                        file.write(chunk)
                size_told = size if size is not None else _told_size(stream)
                if size_told is not None and total != size_told:
                    raise _DamagedError(f"{total} of {size_told} bytes arrived")
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise _DamagedError("its SHA-256 differs from the manifest's")
                if total == 0:
                    raise _DamagedError("nothing arrived")

        self.retry(name, fetch)

    def retry(self, name: str, action: Callable[[], None]) -> None:
        """Run an action until it succeeds, at most as often as was said.

        Raises:
            DataError: the last attempt failed too, or the file does not exist.
        """
        pause = self._first_pause_s
        for attempt in range(1, self._attempts + 1):
            try:
                action()
            except urllib.error.HTTPError as error:
                if error.code in (401, 403, 404, 410):
                    raise DataError(f"{self.url(name)}: {error.code} {error.reason}. Check data.shards.") from error
                problem: Exception = error
            except OSError as error:
                if isinstance(error, PermissionError) or error.errno == errno.ENOSPC:
                    raise DataError(
                        f"{self.url(name)} cannot be stored: {error.strerror}. Make room, or set data.cache elsewhere."
                    ) from error
                problem = error
            except _TRANSIENT as error:
                problem = error
            else:
                return
            if attempt < self._attempts:
                logger.warning("%s: %s; attempt %d of %d.", self.url(name), problem, attempt, self._attempts)
                time.sleep(pause)
                pause *= 2
        raise DataError(
            f"{self.url(name)} could not be read in {self._attempts} attempts: {problem}. Check the address and the "
            "network, or copy the shards to a local disk."
        ) from problem


def _told_size(stream: IO[bytes]) -> int | None:
    """What an HTTP server said it would send; reading in pieces does not notice that less came."""
    told = stream.headers.get("Content-Length") if isinstance(stream, http.client.HTTPResponse) else None
    return int(told) if told is not None else None


class _DamagedError(Exception):
    """What arrived is not what was asked for."""


_TRANSIENT = (_DamagedError, http.client.HTTPException, EOFError, tarfile.TarError)
