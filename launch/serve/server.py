"""The server process: uvicorn, with a limit on how long a client may take to send its headers."""

import asyncio
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["make_server"]

_HEADER_TIMEOUT_S = 10.0
_MOST_CONNECTIONS = 1000


class _ImpatientProtocol(H11Protocol):
    """Closes a connection that has not sent one whole request head in time; uvicorn would wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE:  # no whole request head has come
            self.transport.close()


def make_server(app: FastAPI, *, host: str, port: int) -> uvicorn.Server:
    """A server that is ready to `run()`; SIGTERM and Ctrl-C answer what is going on, then stop."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_ImpatientProtocol,
        ws="none",
        log_level="warning",
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    return uvicorn.Server(config)
