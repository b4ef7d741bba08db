"""Galleries at size: exact search beside a bare Faiss index, approximate kinds, the price of a change, memory.

The vectors are drawn, not embedded: people lie on a curved surface of 20 dimensions in the space of the embeddings
(face networks have been found to use that few: Gong, Boddeti, Jain, CVPR 2019), and each image turns away from its
person by its quality. So people have look-alikes, and the scores of strangers have a tail as those of networks have;
the result states its quantiles. Vectors without such a structure are far harder for every index of clusters:
`--structureless` draws those. `--device cuda` measures exact search on a GPU instead, by wall time, with
vectors of that kind.

The limit of an exact search of P probes among N vectors of D numbers is the product of all pairs, 2 P N D operations,
or the vectors read once, 4 N D bytes, whichever takes longer: for one probe the reading. The product is that of the
faster of float32 and bf16, for bf16 is enough to choose the candidates; a bare Faiss index computes in float32. A
search that looks at a part of the vectors has no such limit.

An approximate index takes its turn beside the bare one with several batches of probes, all of other images: a turn of
a tenth of a second behind one of ten would measure how the caches fill again. The first batch is stated by itself.
"""

import argparse
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.bench.measure import PeakMemory, interleave, own_memory, ratio
from launch.bench.output import Report, measured
from launch.bench.roofline import Precision, measure_peaks
from launch.evaluate_options import positive
from launch.outputs import output_file

if TYPE_CHECKING:
    from retrieval.embeddings import EmbeddingSet
    from retrieval.gallery import Gallery, IndexKind, IndexWish

_DIM = 512
_PERSON_DIMS = 20
_PERSON_WIDTH = math.sqrt(8.0)  # of the surface: sets the tail of the strangers' scores
_IMAGES = 4  # of each person in the gallery
_GALLERY_QUALITY, _PROBE_QUALITY = (0.55, 0.90), (0.45, 0.75)  # cosine of an image with its person
_BLOCK = 1 << 13
_FEW = 32  # probes of a small search
_BATCHES = 16  # of probes in a turn of an approximate index
_SAMPLE = 4000  # searches of other people that choose how much of an index is visited
_GOAL_FROM = 1_000_000  # entries; clusters pay less in a small gallery
_RECALL, _ASKED = 0.98, 0.984  # what such a sample says is off by 0.2 %, and by more where it chose
_FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--size", type=positive, default=100_000, metavar="N", help="enrolled faces")
    parser.add_argument("--probes", type=positive, default=1000, metavar="P", help="searches")
    parser.add_argument("--top", type=positive, default=10, metavar="K", help="length of the lists")
    parser.add_argument("--kinds", nargs="+", default=["ivf-pq"], metavar="KIND", help="kinds of index beside flat")
    parser.add_argument("--rounds", type=positive, default=5, metavar="R", help="rounds of every measurement")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: exact search alone, by wall time"
    )
    parser.add_argument("--structureless", action="store_true", help="people spread evenly, without look-alikes")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for the galleries, 2 KiB a face (default: a temporary one)"
    )
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.device == "cuda":
        return _on_gpu(args)
    import faiss

    as_it_comes = faiss.cvar.distance_compute_blas_threshold
    settings = {key: getattr(args, key) for key in ("size", "probes", "top", "kinds", "rounds", "structureless")}
    report = Report("gallery", ("faiss-cpu", "numpy"), settings)
    faces = DrawnFaces(max(1, args.size // _IMAGES), structureless=args.structureless)
    probes = faces.images(np.arange(args.probes) % faces.count, _PROBE_QUALITY, seed=1)
    work = Path(tempfile.mkdtemp(prefix="aroface-bench-", dir=args.work))
    try:
        gallery = _measure_build(report, work / "g", faces, args.size)
        _describe(report, gallery, probes)
        _measure_exact(report, gallery, probes, args.top, args.rounds, as_it_comes)
        _measure_changes(report, gallery, faces)
        for kind in args.kinds:
            gallery = _measure_kind(report, gallery.directory, kind, faces, probes, args.top, args.rounds)
    finally:
        shutil.rmtree(work)
    report.write(args.out)
    return 0


def _on_gpu(args: argparse.Namespace) -> int:
    import torch

    from launch.bench.gallery_on_gpu import measure_on
    from retrieval.devices import gpu_numbers

    gpu_numbers("cuda:0")  # says what is missing
    device = torch.device("cuda", 0)
    settings = {"size": args.size, "top": args.top, "device": torch.cuda.get_device_name(device)}
    report = Report("gallery", ("faiss-gpu", "faiss-gpu-cu12", "torch", "numpy"), settings)
    measure_on(device, report, size=args.size, top=args.top)
    report.write(args.out)
    return 0


class DrawnFaces:
    """People and their images as embeddings.

    Args:
        count: people.
        structureless: spread them evenly over the sphere.
    """

    def __init__(self, count: int, *, structureless: bool = False) -> None:
        generator = np.random.default_rng(0)
        self.count = count
        self._structureless = structureless
        self._weights = (generator.standard_normal((_PERSON_DIMS, _DIM)) / _PERSON_WIDTH).astype(np.float32)
        self._phases = generator.uniform(0, 2 * np.pi, _DIM).astype(np.float32)
        self._mean = self._surface(np.arange(10_000)).mean(axis=0)

    def images(self, people: NDArray[np.int64], quality: tuple[float, float], *, seed: int) -> NDArray[np.float32]:
        """(n, D) unit vectors of the given people; `quality` bounds their cosine with the person."""
        generator = np.random.default_rng(seed)
        cosine = generator.uniform(*quality, (len(people), 1)).astype(np.float32)
        away = _unit(generator.standard_normal((len(people), _DIM), np.float32))
        turned: NDArray[np.float32] = cosine * self._people(people) + np.sqrt(1 - cosine**2).astype(np.float32) * away
        return _unit(turned)

    def sets(self, size: int) -> "Iterator[EmbeddingSet]":
        """`size` enrolled images in sets of some ten thousand; the image i is of the person i modulo `count`."""
        from retrieval.embeddings import EmbeddingSet

        for start in range(0, size, _BLOCK):
            people = np.arange(start, min(start + _BLOCK, size)) % self.count
            yield EmbeddingSet(self.images(people, _GALLERY_QUALITY, seed=1000 + start), people)

    def _people(self, people: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._structureless:
            return _drawn(people, _DIM)
        return _unit(self._surface(people) - self._mean)

    def _surface(self, people: NDArray[np.int64]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = np.cos(_drawn(people, _PERSON_DIMS, unit=False) @ self._weights + self._phases)
        return values


def _drawn(people: NDArray[np.int64], dimension: int, *, unit: bool = True) -> NDArray[np.float32]:
    """A normal vector of each person, always the same."""
    unique, places = np.unique(people // 1024, return_inverse=True)
    blocks = [np.random.default_rng([7, int(b)]).standard_normal((1024, dimension), np.float32) for b in unique]
    values = np.stack(blocks)[places, people % 1024] if len(people) else np.zeros((0, dimension), np.float32)
    return _unit(values) if unit else values


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


def _measure_build(report: Report, directory: Path, faces: DrawnFaces, size: int) -> "Gallery":
    from retrieval.gallery import Gallery

    drawing = [0.0]

    def drawn() -> "Iterator[EmbeddingSet]":
        sets = faces.sets(size)
        while True:
            start = process_time()
            one = next(sets, None)
            drawing[0] += process_time() - start
            if one is None:
                return
            yield one

    before = own_memory()
    start = process_time()
    with PeakMemory() as peak:
        Gallery.build_from(directory, drawn())
    report.add("build flat, drawing left out", process_time() - start - drawing[0], "CPU-s")
    report.add("build flat, memory with the drawing", (peak.bytes - before) / 2**20, "MiB")
    report.add("gallery on disk", _bytes_of(directory) / size, "bytes/face")
    start = process_time()
    gallery = Gallery.open(directory)
    report.add("open, checksums compared", process_time() - start, "CPU-s")
    return gallery


def _describe(report: Report, gallery: "Gallery", probes: NDArray[np.float32]) -> None:
    """What the drawn scores look like."""
    sample = gallery.embeddings[: 1 << 16]
    scores = np.sort((probes @ sample.T).ravel())
    found = gallery.search(probes, top=1)
    truth = [candidate[0].subject_id == str(i % max(1, len(gallery) // _IMAGES)) for i, candidate in enumerate(found)]
    report.details["drawn"] = {
        "probe_top_1_cosine_median": float(np.median([near[0].score for near in found])),
        "rank_1": float(np.mean(truth)),
        "score_of_strangers": {f"{far:g}": float(scores[-max(1, int(far * len(scores)))]) for far in _FARS},
    }


def _measure_exact(
    report: Report, gallery: "Gallery", probes: NDArray[np.float32], top: int, rounds: int, as_it_comes: int
) -> None:
    """`as_it_comes` is Faiss' own threshold of matrix products; a gallery sets another for the whole process."""
    import faiss

    before = own_memory()
    with PeakMemory() as peak:
        gallery.search(probes, top=top)
    report.add("flat, memory of a search", (peak.bytes - before) / 2**20, "MiB")
    bare = _bare(gallery)
    results: dict[str, Any] = {}

    def by_faiss(some: NDArray[np.float32] = probes) -> int:
        faiss.cvar.distance_compute_blas_threshold = as_it_comes
        results["faiss"] = bare.search(some, top)[1]
        return len(some)

    def by_gallery(some: NDArray[np.float32] = probes) -> int:
        results["gallery"] = gallery.search(some, top=top)
        return len(some)

    few, one = probes[:_FEW], probes[:1]
    small = interleave(
        {
            "faiss, few": lambda: by_faiss(few),
            "gallery, few": lambda: by_gallery(few),
            "faiss, one": lambda: by_faiss(one),
            "gallery, one": lambda: by_gallery(one),
        },
        rounds=rounds,
        on_round=_progress,
    )
    times = interleave({"faiss": by_faiss, "gallery": by_gallery}, rounds=rounds, on_round=_progress)
    peaks = measure_peaks(threads=faiss.omp_get_max_threads())

    def limit_us(count: int, precisions: Sequence[Precision] = ("fp32", "bf16")) -> float:
        flops, read = 2.0 * count * len(gallery) * _DIM, 4.0 * len(gallery) * _DIM
        return 1e6 * min(peaks.limit_s(flops, read, precision) for precision in precisions) / count

    same = np.mean([[int(c.entry_id) for c in near] for near in results["gallery"]] == results["faiss"])
    limit = limit_us(len(probes), ["fp32"])
    report.add("bare IndexFlatIP", 1e6 * times[0].cpu_s / len(probes), "us/probe", limit=limit)
    report.add("flat", 1e6 * times[1].cpu_s / len(probes), "us/probe", limit=limit_us(len(probes)))
    report.add("flat beside bare IndexFlatIP", ratio(times[1], times[0]), "x", at_least=1.0)
    report.add("flat, same entries at the same places", float(same), "")
    report.add(f"flat, {len(few)} probes", 1e6 * small[1].cpu_s / len(few), "us/probe", limit=limit_us(len(few)))
    report.add(f"flat beside bare IndexFlatIP, {len(few)} probes", ratio(small[1], small[0]), "x", at_least=1.0)
    report.add("flat, one probe", 1e6 * small[3].cpu_s, "us/probe", limit=limit_us(1))
    report.add("flat beside bare IndexFlatIP, one probe", ratio(small[3], small[2]), "x", at_least=1.0)
    report.details["exact"] = {one.name: measured(one) for one in (*times, *small)}


def _bare(gallery: "Gallery") -> Any:
    import faiss

    index = faiss.IndexFlatIP(_DIM)
    index.add(np.ascontiguousarray(gallery.embeddings))
    return index


def _measure_changes(report: Report, gallery: "Gallery", faces: DrawnFaces) -> None:
    """Enrol and remove a few faces; each figure is the median of several, waiting for the disk left out."""
    new = faces.images(np.arange(10), _GALLERY_QUALITY, seed=2)

    def timed(change: Callable[[int], object]) -> float:
        seconds = []
        for number in range(5):
            start = process_time()
            change(number)
            seconds.append(process_time() - start)
        return float(np.median(seconds))

    state = [gallery]

    def add_one(number: int) -> None:
        state[0] = state[0].add(new[:1], ["new"], [f"one-{number}"])

    def add_ten(number: int) -> None:
        state[0] = state[0].add(new, ["new"] * 10, [f"ten-{number}-{i}" for i in range(10)])

    def remove_new(number: int) -> None:
        state[0] = state[0].remove(entry_ids=[f"one-{number}"])

    def remove_old(number: int) -> None:
        state[0] = state[0].remove(entry_ids=[str(number)])

    report.add("enrol one face", timed(add_one), "CPU-s")
    report.add("enrol ten faces", timed(add_ten), "CPU-s")
    report.add("remove one entry enrolled lately", timed(remove_new), "CPU-s")
    report.add("remove one entry of a full segment", timed(remove_old), "CPU-s")
    start = process_time()
    state[0].compact()
    report.add("compact after that", process_time() - start, "CPU-s")


def _measure_kind(
    report: Report,
    directory: Path,
    kind: "IndexKind",
    faces: DrawnFaces,
    probes: NDArray[np.float32],
    top: int,
    rounds: int,
) -> "Gallery":
    from retrieval.gallery import Gallery, IndexWish

    # The effort is chosen on other people's images than it is measured on, of the same quality.
    others = np.arange(faces.count)[::-1][:_SAMPLE]
    wish = IndexWish(kind, recall=_ASKED, sample=_SAMPLE, probes=faces.images(others, _PROBE_QUALITY, seed=3))
    _make_index(report, directory, wish)
    before = own_memory()
    indexed = Gallery.open(directory, verify=False)
    with PeakMemory() as peak:
        indexed.search(probes, top=top)
    report.add(f"{kind}, memory of a search", (peak.bytes - before) / 2**20, "MiB")
    flat = Gallery(directory, indexed.manifest.model_copy(update={"index_record": None}), indexed._segments)
    bare = _bare(flat)
    people = (len(probes) + np.arange((_BATCHES - 1) * len(probes))) % faces.count
    more = np.split(faces.images(people, _PROBE_QUALITY, seed=4), _BATCHES - 1)
    exact = [near[0].score for batch in (probes, *more) for near in flat.search(batch, top=1)]
    best: list[float] = []
    firsts: list[float] = []

    def by_faiss() -> int:
        bare.search(probes, top)
        return len(probes)

    def by_flat() -> int:
        flat.search(probes, top=top)
        return len(probes)

    def by_index() -> int:
        best.clear()
        for batch in (probes, *more):
            start = process_time()
            found = indexed.search(batch, top=top)
            if not best:
                firsts.append(process_time() - start)
            best.extend(near[0].score for near in found)
        return len(best)

    times = interleave({"faiss": by_faiss, "flat": by_flat, kind: by_index}, rounds=rounds, on_round=_progress)
    recall = np.mean(np.array(best) >= np.array(exact))
    at_least = 50.0 if kind == "ivf-pq" and len(flat) >= _GOAL_FROM else None
    report.add(f"{kind}", 1e6 * times[2].cpu_s / times[2].items, "us/probe")
    report.add(f"{kind}, first batch of a turn", 1e6 * float(np.median(firsts[1:])) / len(probes), "us/probe")
    report.add(f"{kind} beside bare IndexFlatIP", ratio(times[2], times[0]), "x", at_least=at_least)
    report.add(f"{kind} beside flat", ratio(times[2], times[1]), "x")
    report.add(f"{kind}, recall@1 of these probes", float(recall), "", at_least=at_least and _RECALL)
    record = indexed.manifest.index_record
    if record is not None:
        report.add(f"{kind}, recall@1 stated by the gallery", record.recall.at_1, "")
        report.add(f"{kind}, index on disk", record.file.bytes / record.rows, "bytes/face")
        report.details[kind] = record.model_dump(mode="json") | {one.name: measured(one) for one in times}
    return indexed


def _make_index(report: Report, directory: Path, wish: "IndexWish") -> None:
    from retrieval.gallery import Gallery

    start = process_time()
    before = own_memory()
    with PeakMemory() as peak:
        Gallery.open(directory, verify=False).compact(wish)
    report.add(f"{wish.kind}, making the index", process_time() - start, "CPU-s")
    report.add(f"{wish.kind}, memory of making it", (peak.bytes - before) / 2**20, "MiB")


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _progress(name: str, number: int) -> None:
    logger.info("%s, round %d", name, number)
