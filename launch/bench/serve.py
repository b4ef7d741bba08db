"""The service under load beside the bare model: searches per second, latency, and what HTTP and batching cost.

Starts `aroface serve` with the model and a gallery of drawn embeddings, sends face crops from many clients at once, and
in turn lets the model embed the same faces in batches of several sizes in this process. The clients run on the same
machine and take their part of it. The bare model, in the batch that suits it best, is the limit of the service.
"""

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aroface.errors import ArofaceError
from launch.bench.measure import Measurement, interleave
from launch.bench.output import Report, measured
from launch.evaluate_options import counts, positive
from launch.outputs import output_file

if TYPE_CHECKING:
    from aroface.types import Embedder

_PACKAGES = ("onnxruntime", "torch", "fastapi", "uvicorn", "faiss-cpu", "numpy")
_START_TIMEOUT_S = 120.0
_BOUNDARY = b"aroface-bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="what is served, best an .onnx file")
    parser.add_argument("--clients", type=positive, default=64, metavar="N", help="clients at one time")
    parser.add_argument("--requests", type=positive, default=512, metavar="N", help="requests in a round")
    parser.add_argument("--gallery-size", type=positive, default=10_000, metavar="N", help="entries of the gallery")
    parser.add_argument("--batches", type=counts, default=[1, 8, 32, 64], metavar="N,..", help="bare")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="counted rounds")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from export.parity import synthetic_faces
    from launch.embedders import open_embedder

    names = ("clients", "requests", "gallery_size", "batches", "threads", "rounds")
    report = Report("serve", _PACKAGES, {name: getattr(args, name) for name in names} | {"model": args.model.name})
    embedder = open_embedder(args.model, threads=args.threads, batch_size=max(args.batches))
    faces = synthetic_faces(embedder.contract.image_size)
    latencies: list[list[float]] = []
    with tempfile.TemporaryDirectory(prefix="aroface-bench-") as folder:
        gallery = _draw_gallery(Path(folder), embedder, args.gallery_size)
        with _service(args, gallery) as port:
            variants: dict[str, Callable[[], int]] = {
                f"model alone, batch {batch}": partial(_embed, embedder, faces, batch, args.requests)
                for batch in args.batches
            }
            requests = [_request(face) for face in faces]

            def search() -> int:
                latencies.append(asyncio.run(_load(port, requests, args.clients, args.requests)))
                return len(latencies[-1])

            variants["service"] = search
            found = {one.name: one for one in interleave(variants, rounds=args.rounds)}
    _report(report, found, latencies[1:])
    report.write(args.out)
    return 0


def _report(report: Report, found: dict[str, Measurement], latencies: Sequence[Sequence[float]]) -> None:
    alone = {name: one for name, one in found.items() if name != "service"}
    best = max(alone.values(), key=lambda one: one.items_per_s)
    for name, one in found.items():
        limit = best.items_per_s if name == "service" else None
        report.add(f"{name}, faces per second", one.items_per_s, "/s", limit=limit, higher_is_better=True)
    ratios = [
        fast[0] / slow[0] for fast, slow in zip(best.rounds, found["service"].rounds, strict=True)
    ]  # as many faces in each
    report.add(f"service against {best.name}", statistics.median(ratios), "x", at_least=0.8)
    together = np.concatenate([np.asarray(values) for values in latencies])
    for name, share in (("median", 50), ("99 %", 99)):
        report.add(f"service, {name} of the latencies", 1000 * float(np.percentile(together, share)), "ms")
    report.details["measurements"] = {name: measured(one) for name, one in found.items()}


def _embed(
    embedder: "Embedder", faces: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", batch: int, count: int
) -> int:
    rows = np.arange(count) % len(faces)
    for start in range(0, count, batch):
        embedder.embed(faces[rows[start : start + batch]])
    return count


def _draw_gallery(folder: Path, embedder: "Embedder", count: int) -> Path:
    from retrieval.gallery import Gallery

    vectors = np.random.default_rng(0).standard_normal((count, embedder.embedding_dim), np.float32)
    ids = np.array([f"subject {row}" for row in range(count)])
    Gallery.build(folder / "gallery", vectors, ids, ids, model_id=embedder.model_id, contract=embedder.contract)
    return folder / "gallery"


@contextmanager
def _service(args: argparse.Namespace, gallery: Path) -> Iterator[int]:
    """The port of a service in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "launch", "serve", "--model", str(args.model), "--gallery", str(gallery)]
    command += ["--port", str(port), *(() if args.threads is None else ("--threads", str(args.threads)))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait(process, port)
            yield port
        finally:
            process.terminate()


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise ArofaceError(f"aroface serve did not come up on port {port}; its message stands above.")


def _request(face: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    from aroface.images import encode_jpeg

    body = b"\r\n".join(
        [
            b"--" + _BOUNDARY,
            b'Content-Disposition: form-data; name="image"; filename="face.jpg"',
            b"Content-Type: image/jpeg",
            b"",
            encode_jpeg(face),
            b"--" + _BOUNDARY + b"--",
            b"",
        ]
    )
    head = (
        f"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; "
        f"boundary={_BOUNDARY.decode()}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _load(port: int, requests: Sequence[bytes], clients: int, count: int) -> list[float]:
    """Seconds of each of `count` requests, sent by `clients` that each wait for their answer."""
    numbers = iter(range(count))
    seconds: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            started = time.perf_counter()
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise ArofaceError(f"The service answered {head.splitlines()[0].decode('latin-1')}.")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            seconds.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds
