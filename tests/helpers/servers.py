"""A local HTTP server of one folder that misbehaves as it is told."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: (name of the file, number of the request for it) -> `ok`, `500`, `404`, `drop`, `cut`, `flip`
Mood = Callable[[str, int], str]


@contextmanager
def serve(folder: Path, mood: Mood = lambda name, number: "ok") -> Iterator[tuple[str, Counter[str]]]:
    """Address of the folder, and how often each file was asked for."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            asked[name] += 1
            how, path = mood(name, asked[name]), folder / name
            if how == "drop":
                self.connection.close()
                return
            if how in ("500", "404") or not path.is_file():
                self.send_error(500 if how == "500" else 404)
                return
            data = bytearray(path.read_bytes())
            if how == "flip":
                data[len(data) // 2] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if how == "cut" else data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
