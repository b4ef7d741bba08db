"""LFW-LQ: who is this small, compressed, badly aligned face? Version 1, to be compared only with itself.

Gallery: the first image (by name) of every identity, clean; people with a single image are distractors. Probes: every
other image, clean and at each of several sizes: an alignment error of the FAE-1 family, area-downsampling to N pixels,
JPEG of quality 40 to 80, back to 112 px bilinearly. The error and the quality of a probe are drawn from its key and are
the same at every size, so that sizes differ in resolution alone.

Closed set: all probes, all identities enrolled. Open set: the half of the probes' identities whose names hash lowest is
left out of the gallery, which makes their probes the non-mated searches.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.types import Embedder, FaceSet
from retrieval.degrade import draw_jpeg_quality, generator_for, low_quality, misalign, sample_misalignment
from retrieval.embeddings import EmbeddingSet
from retrieval.extraction import Extraction, FlipMode, Transform, embed_face_set, select_images
from retrieval.metrics import evaluate_identification, evaluate_verification
from retrieval.protocols.lfw_pairs import Pairs
from retrieval.results import identification_record, metric, preprocessing, result_record, verification_record

__all__ = ["CLEAN", "LfwLqSettings", "evaluate_lfw_lq", "joined", "num_forward_images", "split_faces"]

#: Name of the condition without degradation.
CLEAN = "clean"
FIRST_IDENTITIES = 300

_TASK = "lfw-lq"
_RANKS = (1, 5, 10, 20)
_FPIRS = ("0.01", "0.1")
_FARS = ("1e-2", "1e-1")


@dataclass(frozen=True)
class LfwLqSettings:
    """What is evaluated; the defaults are version 1 of the task."""

    sizes_px: tuple[int, ...] = (40, 28, 20, 14)  #: side of the face after downsampling
    severity: float = 0.5  #: of the alignment error, 0 (aligned) to 1 (15 degrees, 8 px, 20 %)
    flip: FlipMode = "sum"
    batch_size: int = 64


def split_faces(faces: FaceSet) -> tuple[list[int], list[int]]:
    """Indices of the gallery (first image of each identity by name) and of the probes (all others).

    Raises:
        DataError: fewer than two identities, or none with two images: nobody could be searched for, or confused.
    """
    gallery, probes = select_images(faces, "first"), select_images(faces, "rest")
    if len(gallery) < 2:
        raise DataError(f"The set has {len(gallery)} identity; identification needs two at least.")
    if not probes:
        raise DataError(
            f"None of the {len(gallery)} identities has two images: nobody is left to search for. "
            "Give at least one identity a second image."
        )
    return gallery, probes


def num_forward_images(faces: FaceSet, settings: LfwLqSettings) -> int:
    """Images that one model embeds (mirror images not counted), for a progress bar."""
    gallery, probes = split_faces(faces)
    return len(gallery) + len(probes) * (1 + len(settings.sizes_px))


def evaluate_lfw_lq(
    embedder: Embedder,
    faces: FaceSet,
    settings: LfwLqSettings,
    *,
    pairs: Pairs,
    on_progress: Callable[[int], None],
    extract: Callable[..., Extraction] = embed_face_set,
) -> dict[str, Any]:
    """All conditions with one model.

    Args:
        embedder: the model.
        faces: aligned, square crops.
        settings: what is evaluated.
        pairs: rows of the face set to compare clean, and which are genuine.
        on_progress: called with the number of images embedded so far.
        extract: does the work of `embed_face_set`, for instance on several ranks.

    Returns:
        A result record with one block per condition: `clean`, `40px`, ..., and `verification`.

    Raises:
        DataError: images that are not square, or nobody to search for.
    """
    gallery_rows, probe_rows = split_faces(faces)
    done = 0

    def embed(rows: Sequence[int], transform: Transform | None = None) -> EmbeddingSet:
        nonlocal done
        found = extract(
            embedder,
            faces,
            indices=rows,
            transform=transform,
            flip=settings.flip,
            batch_size=settings.batch_size,
            on_progress=lambda count: on_progress(done + count),
        )
        done += len(rows)
        return found.embeddings

    back = np.argsort([*gallery_rows, *probe_rows])
    gallery, clean = embed(gallery_rows), embed(probe_rows)
    conditions = {CLEAN: _identify(gallery, clean, size_px=None)}
    for size in settings.sizes_px:
        probes = embed(probe_rows, _degradation(size, settings.severity))
        conditions[f"{size}px"] = _identify(gallery, probes, size_px=size)
    everything = joined(gallery, clean).take(back)
    verified = evaluate_verification(everything, pairs, fars=[float(far) for far in _FARS])
    quality = everything.pair_quality(pairs[0][pairs[2]], pairs[1][pairs[2]])
    verification = verification_record(verified, far_labels=_FARS, quality=quality)
    conditions["verification"] = verification
    metrics = {f"rank_1@{name}": conditions[name]["metrics"]["rank_1"] for name in conditions if name != "verification"}
    metrics[f"rank_1_first_{FIRST_IDENTITIES}"] = _first_identities(gallery, clean)
    metrics |= verification["metrics"]
    return result_record(
        _TASK,
        "canonical",
        counts={**conditions[CLEAN]["counts"], "gallery": len(gallery), "pairs": verification["counts"]["pairs"]},
        metrics=metrics,
        warnings=_warnings(conditions),
        conditions=conditions,
        model=dict(gallery.metadata),
        preprocessing=preprocessing(gallery.metadata)[0],
        settings={"version": 1, "severity": settings.severity, "flip": settings.flip},
    )


def joined(first: EmbeddingSet, second: EmbeddingSet) -> EmbeddingSet:
    """The rows of two sets of one model, one after the other."""
    return EmbeddingSet(
        np.concatenate([first.embeddings, second.embeddings]),
        np.concatenate([first.subject_ids, second.subject_ids]),
        fte=~np.concatenate([first.enrolled, second.enrolled]),
        metadata=first.metadata,
    )


def _degradation(size_px: int, severity: float) -> Transform:
    def degrade(pixels: NDArray[np.uint8], key: str) -> NDArray[np.uint8]:
        if pixels.shape[0] != pixels.shape[1]:
            raise DataError(
                f"{key} is {pixels.shape[1]} x {pixels.shape[0]} pixels; aligned faces are square. Align the set first."
            )
        generator = generator_for(_TASK, key)
        error, quality = sample_misalignment(generator, severity), draw_jpeg_quality(generator)
        return low_quality(misalign(pixels, error), size_px=size_px, jpeg_quality=quality)

    return degrade


def _identify(gallery: EmbeddingSet, probes: EmbeddingSet, *, size_px: int | None) -> dict[str, Any]:
    """Closed set with everyone enrolled; open set with half of the probes' identities left out."""
    closed = identification_record(evaluate_identification([gallery], probes, ranks=_RANKS, fpirs=[]), fpir_labels=[])
    left_out = _left_out(probes.subject_ids)
    open_gallery = gallery.take(~np.isin(gallery.subject_ids, left_out))
    fpirs = [float(label) for label in _FPIRS]
    opened = identification_record(
        evaluate_identification([open_gallery], probes, ranks=_RANKS, fpirs=fpirs), fpir_labels=_FPIRS
    )
    open_metrics = {name: value for name, value in opened["metrics"].items() if name.startswith("tpir@")}
    counts = closed["counts"] | {
        "open_set_mated": opened["counts"]["mated"],
        "open_set_non_mated": opened["counts"]["non_mated"],
    }
    return closed | {
        "size_px": size_px,
        "counts": counts,
        "metrics": closed["metrics"] | open_metrics,
        "curves": closed["curves"] | {"iet": opened["curves"]["iet"]},
        "warnings": [*closed["warnings"], *(text for text in opened["warnings"] if text.startswith("FPIR"))],
    }


def _left_out(subject_ids: NDArray[Any]) -> list[str]:
    def hashed(name: str) -> bytes:
        return hashlib.sha256(f"{_TASK}/open-set/{name}".encode("utf-8", "surrogateescape")).digest()

    names = sorted(set(map(str, subject_ids)), key=hashed)
    return names[: len(names) // 2]


def _first_identities(gallery: EmbeddingSet, probes: EmbeddingSet) -> dict[str, Any]:
    """Rank-1 among the first 300 identities, by name, that have two images or more."""
    names = np.unique(probes.subject_ids)[:FIRST_IDENTITIES]
    chosen = probes.take(np.isin(probes.subject_ids, names))
    result = evaluate_identification([gallery.take(np.isin(gallery.subject_ids, names))], chosen, ranks=[1], fpirs=[])
    _, value, interval = result.ranks[0]
    return metric(value, interval=interval, identities=len(names), probes=len(chosen))


def _warnings(conditions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each text once, with the conditions that it holds for."""
    places: dict[str, list[str]] = {}
    for name, block in conditions.items():
        for text in block["warnings"]:
            places.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in places.items()]
