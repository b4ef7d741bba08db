"""The gate between a checkpoint and what was exported from it: the same faces, the same embeddings."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError, ExportError
from aroface.images import resize_face
from aroface.types import Embedder, FaceSet
from export.embedder import ExportedEmbedder
from export.metadata import Precision

__all__ = [
    "COSINE_LIMITS",
    "NUM_PARITY_FACES",
    "ParityReport",
    "check_parity",
    "distinct_faces",
    "sample_faces",
    "synthetic_faces",
]

#: Smallest cosine between the embeddings of one face, by the precision of the export. For int8 it only finds a broken
#: graph; what int8 costs is measured on an evaluation set (`export.accuracy`).
COSINE_LIMITS: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.995, "int8": 0.5}

_BATCH_SIZES = (1, 3, 8, 64)
NUM_PARITY_FACES = sum(_BATCH_SIZES)
#: The norm is a separate output: it must be the length of the embedding that stands beside it.
_NORM_RELATIVE_LIMIT = 1e-3


@dataclass(frozen=True)
class ParityReport:
    """How close the export is to the checkpoint."""

    batch_sizes: tuple[int, ...]
    num_faces: int
    min_cosine: float
    max_abs_difference: float  #: over all elements of the un-normalised embeddings
    max_relative_norm_difference: float  #: of the `norm` output against the length of the embedding
    cosine_limit: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for the export report."""
        return asdict(self)


def check_parity(reference: Embedder, exported: ExportedEmbedder, faces: NDArray[np.uint8]) -> ParityReport:
    """Compare the two at batch sizes 1, 3, 8 and 64, each batch on faces of its own.

    Args:
        reference: the checkpoint in fp32; the flip fusion of the export, if any, is computed here from its two parts.
            A reference that fuses already (its metadata say so) is taken as it is.
        exported: the file under test.
        faces: (N, S, S, 3) uint8 RGB, N >= `NUM_PARITY_FACES`.

    Raises:
        ExportError: a cosine below the limit of the precision, a norm that is not the embedding's, or NaN.
    """
    if len(faces) < NUM_PARITY_FACES:
        raise ExportError(f"The parity gate got {len(faces)} faces; it needs {NUM_PARITY_FACES}.")
    fuses = isinstance(reference, ExportedEmbedder) and reference.metadata.flip_fusion
    cosines, differences, norm_differences = [], [], []
    start = 0
    for size in _BATCH_SIZES:
        batch = faces[start : start + size]
        start += size
        expected = reference.embed(batch).astype(np.float64)
        if exported.metadata.flip_fusion and not fuses:
            expected += reference.embed(batch[:, :, ::-1])
        embeddings, norms = exported.embed_with_norm(batch)
        got = embeddings.astype(np.float64)
        lengths = np.linalg.norm(got, axis=1)
        cosines.append((expected * got).sum(1) / (np.linalg.norm(expected, axis=1) * lengths))
        differences.append(np.abs(expected - got).max())
        norm_differences.append(np.abs(norms / lengths - 1).max())
    limit = COSINE_LIMITS[exported.metadata.precision]
    report = ParityReport(
        _BATCH_SIZES,
        NUM_PARITY_FACES,
        float(np.concatenate(cosines).min()),
        float(np.max(differences)),
        float(np.max(norm_differences)),
        limit,
    )
    # Written so that NaN fails.
    if not (report.min_cosine >= limit and report.max_relative_norm_difference <= _NORM_RELATIVE_LIMIT):
        raise ExportError(
            f"The exported model does not equal its checkpoint: smallest cosine {report.min_cosine:.6f} (allowed: >= "
            f"{limit}), norm off by {report.max_relative_norm_difference:.1e} (allowed: <= {_NORM_RELATIVE_LIMIT}), "
            f"over {NUM_PARITY_FACES} faces. No file was written. If the cosine is nan, the checkpoint has diverged; "
            "otherwise try other versions of torch and onnxruntime (`aroface doctor` lists them)."
        )
    return report


def sample_faces(face_set: FaceSet, size: int, *, count: int = NUM_PARITY_FACES) -> NDArray[np.uint8]:
    """`count` readable faces spread evenly over a set, resized to (N, size, size, 3); repeated if there are few.

    Raises:
        DataError: not one of the chosen images is readable.
    """
    faces = distinct_faces(face_set, size, count=count)
    return np.stack([faces[i % len(faces)] for i in range(count)])


def distinct_faces(face_set: FaceSet, size: int, *, count: int) -> list[NDArray[np.uint8]]:
    """At most `count` readable faces spread evenly over a set, each resized to (size, size, 3); at least one.

    Raises:
        DataError: not one of the chosen images is readable.
    """
    total = len(face_set.keys)
    spread = np.unique(np.linspace(0, max(total - 1, 0), num=min(4 * count, max(total, 1)), dtype=int))
    faces: list[NDArray[np.uint8]] = []
    unreadable: list[str] = []
    for index in _interleave(spread.tolist()) if total else []:
        try:
            faces.append(resize_face(face_set.read(index), size))
        except DataError as error:
            unreadable.append(str(error))
        if len(faces) == count:
            break
    if not faces:
        reason = f"for example: {unreadable[0]}" if unreadable else "it is empty"
        raise DataError(f"The face set has no readable image for the export ({reason}); name another with --faces.")
    return faces


def _interleave(indices: Sequence[int]) -> list[int]:
    """Every fourth first, so that the first quarter already spans the set."""
    return [index for offset in range(4) for index in indices[offset::4]]


def synthetic_faces(size: int, *, count: int = NUM_PARITY_FACES, seed: int = 0) -> NDArray[np.uint8]:
    """(count, size, size, 3) uint8: smooth random shading with grain on top, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    smooth = np.stack([resize_face(image, size) for image in coarse]).astype(np.float64)
    grain = rng.normal(0.0, 12.0, smooth.shape)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)
