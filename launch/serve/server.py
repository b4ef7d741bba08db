"""The server process: uvicorn, with a limit on how long a client may take to send its headers."""

import asyncio
import json
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from launch.serve.guard import answer

__all__ = ["make_server"]

_HEADER_TIMEOUT_S = 10.0
_MOST_CONNECTIONS = 1000


class _ImpatientProtocol(H11Protocol):
    """Closes a connection that has not sent one whole request head in time; uvicorn would wait for ever.

    The time runs from the connection, and later from the first byte of a head; between two requests uvicorn's own
    keep-alive time does. What it refuses of itself is answered in the form of all other problems.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            self.app = _refuse
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self._stop()
        elif self._deadline is None:
            self._start()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": msg}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        self._deadline = self.loop.call_later(_HEADER_TIMEOUT_S, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, 503, f"{_MOST_CONNECTIONS} connections are open; try again in a moment.")


def make_server(app: FastAPI, *, host: str, port: int) -> uvicorn.Server:
    """A server that is ready to `run()`; SIGTERM and Ctrl-C answer what is going on, then stop."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_ImpatientProtocol,
        ws="none",
        log_level="warning",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    return uvicorn.Server(config)
