"""The rates that the accuracy gate of an export compares, measured on a set of faces."""

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from aroface.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from aroface.types import Embedder, FaceSet
    from retrieval.embeddings import EmbeddingSet
    from retrieval.metrics import OpenSetPoint, VerificationPoint

__all__ = ["measure_rates", "rates_on"]

_IMPOSTOR_PAIRS = 100_000

_log = logging.getLogger(__name__)


def rates_on(
    faces: "FaceSet", *, far: float, fpir: float, waived: Collection[str] = ()
) -> "Callable[[Embedder], Mapping[str, float]]":
    """A function from an embedder to its rates on `faces`: see `measure_rates`."""
    from launch.progress import Progress
    from retrieval.extraction import embed_face_set

    def measure(embedder: "Embedder") -> Mapping[str, float]:
        with Progress(f"Accuracy, {embedder.model_id}", total=len(faces.keys), unit="images") as progress:
            extraction = embed_face_set(embedder, faces, on_progress=progress.update)
        return measure_rates(extraction.embeddings, far=far, fpir=fpir, waived=waived)

    return measure


def measure_rates(
    embeddings: "EmbeddingSet", *, far: float, fpir: float, waived: Collection[str] = ()
) -> dict[str, float]:
    """Rank-1, TAR@FAR and TPIR@FPIR of one set, in [0, 1].

    Rank-1: the first image of every identity is the gallery, the others search it. TPIR: every second identity is taken
    out of the gallery, and its images search as strangers. TAR: every image with the first of its identity, against
    100,000 drawn pairs of two identities. All draws depend on the set alone, so two models see the same trials.

    Args:
        embeddings: in the order of the set, with keys.
        far: wanted false-accept rate.
        fpir: wanted false-positive identification rate.
        waived: `tar` or `tpir`, which may fall by anything: left out where the set is too small for it.

    Raises:
        DataError: nobody has two images, or there is one identity only.
        ConfigError: the set is too small for a wanted rate that is not waived.
    """
    from retrieval.metrics import evaluate_identification, evaluate_pairs, pair_scores

    person, first_rows, others = _split(embeddings)
    enrolled = person[first_rows] % 2 == 0
    every = evaluate_identification(
        [embeddings.take(first_rows)], embeddings.take(others), ranks=(1,), fpirs=(), candidates=1
    )
    half = evaluate_identification(
        [embeddings.take(first_rows[enrolled])], embeddings.take(others), ranks=(1,), fpirs=(fpir,), candidates=1
    )
    left, right = _impostors(person)
    first = np.concatenate([first_rows[person[others]], left])
    second = np.concatenate([others, right])
    same = np.arange(len(first)) < len(others)
    pairs = evaluate_pairs(pair_scores(embeddings, first, second), same, fars=(far,))
    identified, verified = half.open_set[0], pairs.points[0]
    rates = {
        "rank_1": float(every.ranks[0][1] or 0.0),
        f"tar@far={far:g}": _existing("tar", verified.tar, verified, f"--far {far:g}", waived),
        f"tpir@fpir={fpir:g}": _existing("tpir", identified.tpir, identified, f"--fpir {fpir:g}", waived),
    }
    return {name: rate for name, rate in rates.items() if rate is not None}


def _split(embeddings: "EmbeddingSet") -> "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]":
    """(person of each row, first row of each person by key, all other rows)."""
    keys = np.arange(len(embeddings)) if embeddings.keys is None else embeddings.keys
    order = np.lexsort((keys, embeddings.subject_ids))
    names, starts, person_in_order = np.unique(embeddings.subject_ids[order], return_index=True, return_inverse=True)
    person = np.empty(len(order), np.int64)
    person[order] = person_in_order
    first_rows = order[starts]
    others = np.setdiff1d(np.arange(len(order)), first_rows)
    if len(names) < 2 or len(others) == 0:
        raise DataError(
            f"The accuracy set has {len(names)} identities and {len(others)} images beside their first; it takes two "
            "identities at least, and several images of each. Name another with --accuracy-set."
        )
    return person, first_rows, others


def _impostors(person: "NDArray[np.int64]") -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, len(person), (2, _IMPOSTOR_PAIRS))
    different = person[left] != person[right]
    return left[different], right[different]


def _existing(
    kind: str, value: float | None, found: "VerificationPoint | OpenSetPoint", option: str, waived: Collection[str]
) -> float | None:
    """The rate, if a false accept at least stands behind it; None without one where that does not matter."""
    from retrieval.metrics.rules import MIN_SUPPORTED

    point = found.point
    if value is None or point is None or point.k < 1:
        why = found.reason or "not one false accept is allowed at that rate"
        if kind in waived:
            _log.warning("%s does not exist on the accuracy set (%s); %s is left out, as waived.", option, why, kind)
            return None
        raise ConfigError(
            f"{option} does not exist on the accuracy set ({why}); name a larger set with --accuracy-set, a higher "
            f"rate, or waive it (--max-{kind}-drop 1)."
        )
    if point.k < MIN_SUPPORTED:
        _log.warning(
            "%s rests on %d false accepts of the accuracy set; a steady rate takes %d.", option, point.k, MIN_SUPPORTED
        )
    return value
