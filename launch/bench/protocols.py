"""The protocols at their real size, on drawn embeddings: time and memory after embedding.

IJB-C 1:1 (23,124 templates, 15.66 M pairs) with and without the bootstrap over subjects, IJB-C 1:N (19,593 probes, two
galleries), TinyFace (3,728 probes, 157,871 gallery images, mAP), and the pooling of IJB-S videos of two lengths. Each
runs in a process of its own. The limit of a protocol is the float32 product of its templates, 2 R C D operations for R
by C of them, or the templates read once; of the pooling, every frame read once. The bootstrap has none. Times are wall
times, and so are the peaks behind the limits.

With --device the searches alone, there and on the CPU in turns, and whether they found the same.
"""

import argparse
import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from aroface.errors import ConfigError
from launch.bench.measure import PeakMemory
from launch.bench.output import Report
from launch.bench.roofline import Peaks, measure_peaks
from launch.outputs import output_file

if TYPE_CHECKING:
    from retrieval.embeddings import EmbeddingSet

#: Galleries, probes and options of `evaluate_identification`.
Search = tuple[list["EmbeddingSet"], "EmbeddingSet", dict[str, Any]]

_DIM = 512
_ENROLMENTS, _PROBES, _PAIRS = 3531, 19593, 15_658_489
_TINYFACE = (2569, 3728, 4443, 153_428)  #: people, probes, matches in the gallery, distractors
_IJBS_TEMPLATES = 3852
_FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="factor on every size, for a quick look")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="resamples of the bootstrap")
    parser.add_argument(
        "--device", metavar="D", help="the searches alone, on GPUs beside the CPU: cuda, cuda:0 or cuda:0,1"
    )
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    settings = {"scale": args.scale, "resamples": args.resamples}
    if args.device is not None:
        return _searches_on(args, settings)
    report = Report("protocols", ("numpy", "scipy"), settings)
    peaks = _peaks()
    is_real_size = args.scale == 1  # the goals are those of the real sets
    ijbc, tinyface = (_ENROLMENTS, _PROBES), (_TINYFACE[1], _TINYFACE[2] + _TINYFACE[3])
    for name, work, most_s, most_gib, product in (
        (f"IJB-C 1:1, {args.scale * _PAIRS / 1e6:.4g} M pairs, 6 FARs", _ijbc_pairs, 10, 2, ijbc),
        ("IJB-C 1:1, bootstrap over subjects", _ijbc_bootstrap, 60, None, None),
        ("IJB-C 1:N, two galleries", _ijbc_search, 10, None, ijbc),
        ("TinyFace with distractors and mAP", _tinyface, 30, 1.5, tinyface),
    ):
        seconds, peak = _in_process(work, args.scale, args.resamples)
        limit = None if product is None else _product_s(peaks, *(max(4, int(size * args.scale)) for size in product))
        report.add(f"{name}, time", seconds, "s", at_most=most_s if is_real_size else None, limit=limit)
        report.add(f"{name}, memory", peak / 2**30, "GiB", at_most=most_gib if is_real_size else None)
    peak_of: dict[int, int] = {}
    for frames in (50, 500):
        seconds, peak = _in_process(_ijbs_pooling, args.scale, frames)
        peak_of[frames] = peak
        report.add(f"IJB-S pooling, {frames} frames a template, memory", peak / 2**20, "MiB")
        rate, limit = int(_IJBS_TEMPLATES * args.scale) * frames / seconds, peaks.bytes_per_s / (4 * _DIM)
        name = f"IJB-S pooling, {frames} frames a template"
        report.add(name, rate, "frames/s", limit=limit, higher_is_better=True)
    report.add("IJB-S pooling, 500 frames over 50, memory", peak_of[500] / peak_of[50], "ratio", at_most=1.1)
    report.write(args.out)
    return 0


def _searches_on(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    from launch.bench.searches_on_gpu import measure_on
    from retrieval.metrics.device_blocks import search_devices

    devices = search_devices(args.device)
    if not devices:
        raise ConfigError(f"--device {args.device}: nothing to compare the CPU with; leave it out, or name a GPU.")
    import torch

    names = [torch.cuda.get_device_name(device) for device in devices]
    report = Report("protocols", ("numpy", "torch"), {**settings, "device": args.device, "devices": names})
    measure_on(devices, report, scale=args.scale)
    report.write(args.out)
    return 0


def _peaks() -> Peaks:
    import torch

    return measure_peaks(threads=torch.get_num_threads(), clock="wall")


def _product_s(peaks: Peaks, rows: int, columns: int) -> float:
    return peaks.limit_s(2.0 * rows * columns * _DIM, 4.0 * (rows + columns) * _DIM)


def _in_process(work: Callable[[float, int], float], scale: float, count: int) -> tuple[float, int]:
    """(seconds, peak of the own memory in bytes) of one piece of work."""
    logger.info("running %s", work.__name__.strip("_"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, scale, count).result()


def _measured(work: Callable[[float, int], float], scale: float, count: int) -> tuple[float, int]:
    with PeakMemory() as peak:
        seconds = work(scale, count)
    return seconds, peak.bytes


def _ijbc(scale: float) -> tuple["np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray"]:
    """Embeddings (enrolments first, then probes), their subjects, and the pairs."""
    generator = np.random.default_rng(0)
    people, probes, pairs = (max(8, int(size * scale)) for size in (_ENROLMENTS, _PROBES, _PAIRS))
    subjects = np.concatenate([np.arange(people), np.arange(probes) % people])
    values = _people(generator, people)[subjects] + 0.08 * generator.standard_normal((len(subjects), _DIM), np.float32)
    first = np.sort(generator.integers(0, people, pairs)).astype(np.int32)
    second = (people + generator.integers(0, probes, pairs)).astype(np.int32)
    genuine = np.arange(probes, dtype=np.int32)
    first, second = np.concatenate([genuine % people, first]), np.concatenate([people + genuine, second])
    return values, subjects, first, second, subjects[first] == subjects[second]


def _people(generator: "np.random.Generator", count: int) -> "np.ndarray":
    values = generator.standard_normal((count, _DIM), np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


def _ijbc_pairs(scale: float, resamples: int) -> float:
    from retrieval.embeddings import EmbeddingSet
    from retrieval.metrics import evaluate_pairs, pair_scores

    values, subjects, first, second, same = _ijbc(scale)
    start = perf_counter()
    scores = pair_scores(EmbeddingSet(values, subjects), first, second)
    evaluate_pairs(scores, same, fars=_FARS)
    return perf_counter() - start


def _ijbc_bootstrap(scale: float, resamples: int) -> float:
    from retrieval.embeddings import EmbeddingSet
    from retrieval.metrics import bootstrap_tar, pair_scores

    values, subjects, first, second, same = _ijbc(scale)
    scores = pair_scores(EmbeddingSet(values, subjects), first, second)
    left, right = subjects[first], subjects[second]
    start = perf_counter()
    impostor = left[~same], right[~same]
    bootstrap_tar(scores[same], left[same], scores[~same], impostor, _FARS, resamples=resamples)
    return perf_counter() - start


def ijbc_search(scale: float) -> Search:
    """Both galleries and the probes of IJB-C 1:N."""
    from retrieval.embeddings import EmbeddingSet

    values, subjects, *_ = _ijbc(scale)
    people = max(8, int(_ENROLMENTS * scale))
    half = people // 2
    parts = (slice(half), slice(half, people), slice(people, None))
    one, two, probes = (EmbeddingSet(values[part], subjects[part]) for part in parts)
    return [one, two], probes, {"ranks": (1, 5, 10), "fpirs": (0.001, 0.01, 0.1)}


def _ijbc_search(scale: float, resamples: int) -> float:
    return _timed(ijbc_search(scale))


def tinyface(scale: float) -> Search:
    """Gallery and probes of TinyFace, with average precision."""
    from retrieval.embeddings import EmbeddingSet

    generator = np.random.default_rng(0)
    people, probes, matches, others = (max(4, int(size * scale)) for size in _TINYFACE)
    centres = _people(generator, people)
    gallery = generator.standard_normal((matches + others, _DIM), np.float32)
    gallery *= 0.08
    gallery[:matches] += centres[np.arange(matches) % people]
    gallery_ids = np.concatenate([np.arange(matches) % people, -1 - np.arange(others)])
    own = np.arange(probes) % people
    searches = centres[own] + 0.08 * generator.standard_normal((probes, _DIM), np.float32)
    options = {"ranks": (1, 5, 10, 20, 50), "fpirs": (), "with_average_precision": True}
    return [EmbeddingSet(gallery, gallery_ids)], EmbeddingSet(searches, own), options


def _tinyface(scale: float, resamples: int) -> float:
    return _timed(tinyface(scale))


def _timed(search: Search) -> float:
    from retrieval.metrics import evaluate_identification

    galleries, probes, options = search
    start = perf_counter()
    evaluate_identification(galleries, probes, **options)
    return perf_counter() - start


def _ijbs_pooling(scale: float, frames: int) -> float:
    """Frames of 3,852 (subject, video) templates, drawn as they would come from a model."""
    from retrieval.templates import Pooling, TemplateSums

    generator = np.random.default_rng(0)
    templates = int(_IJBS_TEMPLATES * scale)
    sums = TemplateSums(templates, _DIM, Pooling(media=False))
    batch = generator.standard_normal((4096, _DIM), np.float32)
    start = perf_counter()
    for first in range(0, templates * frames, len(batch)):
        rows = np.arange(first, min(first + len(batch), templates * frames))
        sums.add(rows // frames, rows, batch[: len(rows)])
    sums.finish()
    return perf_counter() - start
