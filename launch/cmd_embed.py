"""Turn the faces of a folder, archive, list or shard directory into embeddings.

MODEL is a run directory, one of its checkpoints (both on PyTorch), an .onnx file (on ONNX Runtime, or on OpenVINO with
--runtime openvino), or a TensorRT .engine. Embeddings are written un-normalised, one row per image, with identity and
key. An image that cannot be read gets a zero row marked `fte` (failure to enrol) and is named in a warning.

--out FILE.npz is one file. --out DIR is for large sets: a part per shard or 4096 images, and an index when all are
there. The same command goes on where it stopped, and is refused where images were replaced since; given on other
machines that share the folder, or with --processes, it takes the parts that nobody works on. Every command that reads
an embedding file reads such a folder too.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import ArofaceError, ConfigError
from launch.evaluate_options import positive
from launch.model_options import add_runtime_options
from launch.outputs import output_file, output_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from aroface.types import Embedder
    from retrieval.extraction import Extraction
    from retrieval.parted_extraction import PartedExtraction
    from shards.faces import StoredFaces

_IMAGES_PER_PART = 4096
_WATCH_S = 0.5
#: Set for the processes that --processes starts.
_WORKER = "AROFACE_EMBED_WORKER"
_USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="run directory, checkpoint, .onnx or .engine file")
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder or archive of identity/image, list, shards, flat folder"
    )
    parser.add_argument("--out", type=_output, required=True, metavar="OUT", help="FILE.npz, or a folder for parts")
    parser.add_argument(
        "--take",
        choices=("all", "first", "rest"),
        default="all",
        help="all images, the first of each identity by name (a gallery), or the others",
    )
    parser.add_argument(
        "--flip",
        choices=("none", "sum"),
        default="none",
        help="sum: add the embedding of the mirror image",
    )
    aligned = parser.add_mutually_exclusive_group()
    aligned.add_argument(
        "--landmarks", type=Path, metavar="FILE", help="align by these points (.csv, .json, or the .txt of IJB)"
    )
    aligned.add_argument(
        "--align", action="store_true", help="align by the points in the list that IMAGES is; not for shards"
    )
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images per call")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the model (default: all cores)")
    parser.add_argument("--decode-threads", type=positive, default=2, metavar="N", help="threads that decode")
    add_runtime_options(parser)
    parts = parser.add_argument_group("for a folder of parts")
    parts.add_argument(
        "--images-per-part",
        type=positive,
        default=_IMAGES_PER_PART,
        metavar="N",
        help="at most; a part never spans two shards",
    )
    parts.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="on this machine, each on a GPU of its own where there are several",
    )


def _output(text: str) -> Path:
    return output_file(text) if Path(text).suffix == ".npz" else output_folder(text)


def run(args: argparse.Namespace) -> int:
    """Embed and save."""
    if args.out.suffix == ".npz":
        if args.processes > 1:
            raise ConfigError(f"--processes {args.processes} needs a folder for --out, such as {args.out.stem}.")
        return _embed_to_file(args)
    if args.out.suffix:
        raise ConfigError(f"--out {args.out}: name a file that ends in .npz, or a folder.")
    if args.processes > 1 and _WORKER not in os.environ:
        return _start_processes(args)
    return _embed_in_parts(args)


class _Job:
    """What is embedded, by what: the same in every process."""

    def __init__(self, args: argparse.Namespace) -> None:
        from launch.embedders import open_embedder
        from retrieval.extraction import select_images
        from shards.faces import align_faces, aligned_when_packed, open_face_set

        faces: StoredFaces = open_face_set(args.images, align=args.align, as_stored=args.out.suffix != ".npz")
        self.faces = faces if args.landmarks is None else align_faces(faces, args.landmarks)
        self.unaligned = faces
        self.embedder: Embedder = open_embedder(
            args.model,
            precision=args.precision,
            threads=args.threads,
            batch_size=args.batch,
            runtime=args.runtime,
        )
        _refuse_double_flip(self.embedder, args)
        self.indices = select_images(self.faces, args.take)
        self._args = args
        self.metadata = {"images": str(args.images), "take": args.take}
        packed = aligned_when_packed(faces)
        steps = [None if packed is None else f"{packed}, when packed", "the list" if args.align else None]
        steps.append(None if args.landmarks is None else args.landmarks.name)
        if any(steps):
            self.metadata["aligned_by"] = "; ".join(step for step in steps if step)

    def embed(self, indices: Sequence[int], on_progress: "Callable[[int], None]", *, is_part: bool) -> "Extraction":
        """Some images, in that order."""
        from retrieval.extraction import embed_face_set

        return embed_face_set(
            self.embedder,
            self.faces,
            indices=indices,
            flip=self._args.flip,
            batch_size=self._args.batch,
            decode_threads=self._args.decode_threads,
            on_progress=on_progress,
            metadata=self.metadata,
            may_all_fail=is_part,
        )


def _embed_to_file(args: argparse.Namespace) -> int:
    from launch.progress import Progress
    from retrieval.embedding_files import write_embeddings

    job = _Job(args)
    started = time.perf_counter()
    with Progress("Embed", total=len(job.indices), unit="images") as progress:
        extraction = job.embed(job.indices, progress.update, is_part=False)
    elapsed_s = time.perf_counter() - started
    write_embeddings(args.out, extraction.embeddings)
    identities = len({job.faces.identities[index] for index in job.indices})
    print(f"{args.out}: {len(job.indices)} images of {identities} identities, D = {job.embedder.embedding_dim}")
    print(
        f"  model {job.embedder.model_id}, {len(job.indices) / elapsed_s:.1f} images/s, "
        f"{len(extraction.unreadable)} unreadable"
    )
    return 0


def _embed_in_parts(args: argparse.Namespace) -> int:
    from retrieval.parted_extraction import PartedExtraction, part_bounds
    from shards.faces import shard_of_rows

    job = _Job(args)
    shards = shard_of_rows(job.unaligned)
    bounds = part_bounds(
        len(job.indices),
        images_per_part=args.images_per_part,
        groups=None if shards is None else [shards[index] for index in job.indices],
    )
    parts = PartedExtraction(
        args.out,
        description={
            "model_id": job.embedder.model_id,
            "contract": job.embedder.contract.model_dump(),
            "flip": args.flip,
            "precision": args.precision,
            **{key: value for key, value in job.metadata.items() if key != "images"},
        },
        source=job.faces.digest(job.indices),
        keys=[job.faces.keys[index] for index in job.indices],
        bounds=bounds,
    )
    return _work(args, job, parts)


def _work(args: argparse.Namespace, job: _Job, parts: "PartedExtraction") -> int:
    from launch.progress import Progress

    total = len(job.indices)
    started, before = time.perf_counter(), parts.rows_done
    own = 0
    with Progress("Embed", total=total, unit="images", done_before=before) as progress:
        is_shown = _WORKER not in os.environ

        def show(done: int) -> None:
            if is_shown:
                progress.update(min(done, total))

        def embed(start: int, stop: int) -> Any:
            nonlocal own
            done = parts.rows_done
            found = job.embed(job.indices[start:stop], lambda count: show(done + count), is_part=True)
            own += stop - start
            return found.embeddings

        show(before)
        made = parts.work(embed, on_idle=lambda: show(parts.rows_done))
        show(total)
    if _WORKER in os.environ:
        return 0
    elapsed_s = time.perf_counter() - started
    _say_done(args)
    print(f"  {made} parts made here, {before} images were there before, {own / max(elapsed_s, 1e-9):.1f} images/s")
    return 0


def _say_done(args: argparse.Namespace) -> None:
    """Read the whole once, as an evaluation will."""
    from retrieval.embedding_files import read_embeddings

    found = read_embeddings(args.out)
    failed = int((~found.enrolled).sum())
    print(f"{args.out}: {len(found)} images, D = {found.embeddings.shape[1]}, {failed} not enrolled")


def _start_processes(args: argparse.Namespace) -> int:
    """The same command several times; whoever dies leaves its part to the others."""
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.processes)
    command = [sys.executable, "-m", "launch.cli", "embed", *_as_options(args, threads)]
    started = time.perf_counter()
    devices = _devices()
    workers = [
        subprocess.Popen(command, env={**os.environ, _WORKER: str(number), **_device(devices, number)})
        for number in range(args.processes)
    ]
    _watch(workers, args.out)
    if any(worker.returncode == _USER_ERROR for worker in workers):
        return _USER_ERROR
    lost = [worker.returncode for worker in workers if worker.returncode]
    if len(lost) == len(workers):
        raise ArofaceError(
            f"All {len(workers)} processes ended early (exit codes {', '.join(map(str, lost))}; -9 is often a lack of "
            "memory: take fewer --processes or a smaller --batch). The same command goes on where they stopped."
        )
    if lost:
        print(
            f"aroface embed: {len(lost)} of {len(workers)} processes ended early; the others did their part.",
            file=sys.stderr,
        )
    _say_done(args)
    print(f"  {args.processes} processes, {time.perf_counter() - started:.1f} s with starting them")
    return 0


def _watch(workers: "Sequence[subprocess.Popen[bytes]]", folder: Path) -> None:
    """Show what all of them have done until they end; none outlives this process, unless it is killed outright."""
    from launch.progress import Progress
    from retrieval.parted_extraction import extraction_progress

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ExitStack() as stack:
            progress: Progress | None = None
            while any(worker.poll() is None for worker in workers):
                if any(worker.returncode == _USER_ERROR for worker in workers):
                    break  # its message stands on stderr, and the others would only repeat it
                if (state := extraction_progress(folder)) is not None:
                    progress = progress or stack.enter_context(
                        Progress("Embed", total=state[1], unit="images", done_before=state[0])
                    )
                    progress.update(state[0])
                time.sleep(_WATCH_S)
            if progress is not None and (state := extraction_progress(folder)) is not None:
                progress.update(state[0])
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
            worker.wait()
        signal.signal(signal.SIGTERM, before)


def _devices() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _device(devices: Sequence[str], number: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}


def _as_options(args: argparse.Namespace, threads: int) -> list[str]:
    options = [str(args.model), str(args.images), "--out", str(args.out), "--take", args.take, "--flip", args.flip]
    options += ["--batch", str(args.batch), "--threads", str(threads), "--decode-threads", str(args.decode_threads)]
    options += ["--precision", args.precision, "--runtime", args.runtime]
    options += ["--images-per-part", str(args.images_per_part)]
    options += ["--landmarks", str(args.landmarks)] if args.landmarks is not None else []
    return [*options, *(["--align"] if args.align else [])]


def _refuse_double_flip(embedder: object, args: argparse.Namespace) -> None:
    metadata = getattr(embedder, "metadata", None)
    if args.flip == "sum" and metadata is not None and metadata.flip_fusion:
        raise ConfigError(f"{args.model} adds the mirror image itself (--flip-fusion on export); use --flip none.")
