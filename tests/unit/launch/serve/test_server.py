"""Connections that stay open, and clients that never finish a request head."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from http.client import HTTPResponse

import pytest
from fastapi import FastAPI

from launch.serve import server

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(server, "_HEADER_TIMEOUT_S", 0.4)
    app = FastAPI()
    app.get("/")(lambda: "fine")
    made = server.make_server(app, host="127.0.0.1", port=0)
    thread = threading.Thread(target=made.run)
    thread.start()
    while not made.started:
        time.sleep(0.01)
    yield made.servers[0].sockets[0].getsockname()[1]
    made.should_exit = True
    thread.join()


def answer(connection):
    """A whole answer, or nothing where the connection is closed instead."""
    connection.settimeout(20)
    received = b""
    while not received.endswith(b'"fine"'):
        part = connection.recv(1000)
        if not part:
            break
        received += part
    return received


def test_a_connection_that_waits_between_requests_is_kept(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"\r\n")
            assert answer(connection).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)


@pytest.mark.parametrize("first", [b"", HEAD + b"\r\n"], ids=["first request", "second request"])
def test_a_head_that_does_not_end_closes_the_connection(port, first):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        if first:
            connection.sendall(first)
            assert answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD)
        assert answer(connection) == b""


def test_a_connection_without_a_word_is_closed(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        assert answer(connection) == b""


def test_a_garbled_head_is_answered_in_the_form_of_all_problems(port):
    for garbage in (b"\x00\xff\r\n\r\n", HEAD + b"Content-Length: two\r\n\r\n", HEAD + b"X" * 100_000):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(garbage)
            status, headers, body = whole_answer(connection)
        assert status == 400
        assert headers["content-type"] == "application/json"
        assert "error" in json.loads(body)


def test_more_connections_than_are_taken_are_told_so(port, monkeypatch):
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 2)
    with ExitStack() as stack:
        first, _, third = (stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3))
        third.sendall(HEAD + b"\r\n")
        status, headers, body = whole_answer(third)
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert "2 connections are open" in json.loads(body)["error"]
        first.sendall(HEAD + b"\r\n")
        assert answer(first).startswith(b"HTTP/1.1 200")


def whole_answer(connection):
    """Status, headers, body of an answer after which the connection is closed."""
    connection.settimeout(20)
    response = HTTPResponse(connection)
    response.begin()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
