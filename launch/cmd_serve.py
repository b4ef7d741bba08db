"""A gallery over HTTP: enrol, search, compare and delete faces, with a page to try it on.

Bound to localhost it needs no access key; on any other address one must stand in --key-file. Faces are aligned crops,
or photographs with their five landmarks; with --detector, photographs of one person. GET /openapi.json describes the
interface, /metrics is for Prometheus.
"""

import argparse
import gc
from pathlib import Path

from launch.evaluate_options import positive
from launch.gallery_options import add_device
from launch.model_options import add_runtime_options

_SHORTEST_KEY = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="MODEL", help="run directory, checkpoint, .onnx or .engine"
    )
    parser.add_argument("--gallery", required=True, metavar="G", help="directory of the gallery")
    add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="file that holds the access key")
    parser.add_argument("--detector", type=Path, metavar="YUNET.onnx", help="OpenCV YuNet model, to align photographs")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="faces embedded together")
    parser.add_argument("--queue", type=positive, default=256, metavar="N", help="requests that may wait")
    parser.add_argument("--max-upload-mib", type=positive, default=8, metavar="MIB", help="largest request")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Open, serve until a signal comes."""
    from launch.embedders import open_embedder
    from launch.serve.app import create_app
    from launch.serve.guard import GuardSettings, is_loopback
    from launch.serve.server import make_server
    from launch.serve.service import FaceService
    from launch.serve.stats import ServiceStats
    from retrieval.gallery import Gallery

    directory = _directory(args.gallery)
    key = _access_key(args.key_file, needs_one=not is_loopback(args.host), host=args.host)
    _check_port(args.host, args.port)
    detector = None
    if args.detector is not None:
        from launch.serve.yunet import YuNet

        detector = YuNet(args.detector)
    gallery = Gallery.open(directory, device=args.device)
    embedder = open_embedder(
        args.model, precision=args.precision, threads=args.threads, batch_size=args.batch, runtime=args.runtime
    )
    service = FaceService(
        embedder, gallery, ServiceStats(), detector=detector, max_batch=args.batch, max_queue=args.queue
    )
    gallery.make_ready()
    limits = GuardSettings(key, max_body_bytes=args.max_upload_mib << 20, max_requests=args.queue + args.batch)
    app = create_app(service, limits)
    print(f"{len(gallery)} entries of {args.gallery} on {args.device}, {embedder.model_id}", flush=True)
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{shown}:{args.port}/  ({'access key needed' if key else 'no access key'}; Ctrl-C stops)", flush=True)
    _freeze_what_stays()
    make_server(app, host=args.host, port=args.port).run()
    return 0


def _freeze_what_stays() -> None:
    """Search modules and settings for garbage no more: each full collection kept all answers waiting for it."""
    gc.collect()
    gc.freeze()


def _directory(gallery: str) -> Path:
    from aroface.errors import ConfigError

    if "://" in gallery:
        raise ConfigError(
            f"--gallery {gallery} is an address; the service takes directories only, no gallery in Milvus. Build one "
            "in a directory from the same embeddings (`aroface gallery build`) and serve that."
        )
    return Path(gallery)


def _access_key(path: Path | None, *, needs_one: bool, host: str) -> str | None:
    from aroface.errors import ConfigError

    if path is None:
        if needs_one:
            raise ConfigError(
                f"--host {host} can be reached from other machines, so an access key is needed: put one of "
                f"{_SHORTEST_KEY} characters or more into a file and name it with --key-file."
            )
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--key-file {path} cannot be read: {error}.") from error
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"--key-file {path}: the key has {len(key)} characters; {_SHORTEST_KEY} or more printable ASCII characters "
            "without spaces are needed, such as `openssl rand -hex 16` gives."
        )
    return key


def _check_port(host: str, port: int) -> None:
    """Say before the model is loaded that the address is taken."""
    import socket

    from aroface.errors import ConfigError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error}. Name another.") from error
