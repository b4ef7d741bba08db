"""The evaluators that a training configuration names: `evaluate.sets`, each spread over the ranks that train."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aroface.config.evaluate import EvaluateConfig, LfwLqSet, VerificationSet
from aroface.distributed import any_rank, rank, share_out, world_size
from aroface.errors import DataError
from aroface.types import Embedder, Evaluator, FaceSet

if TYPE_CHECKING:
    from retrieval.extraction import Extraction
    from retrieval.protocols.lfw_pairs import Pairs

__all__ = ["embed_by_turns", "open_evaluators"]

_FARS = ("1e-3", "1e-2", "1e-1")


def open_evaluators(config: EvaluateConfig | None) -> list[Evaluator]:
    """One evaluator per set, opened now so that a wrong path costs no training.

    Raises:
        ArofaceError: faces or pairs that are missing or damaged.
    """
    if config is None:
        return []
    return [
        _LfwLq(one, config.batch_size) if one.kind == "lfw_lq" else _Verification(one, config.batch_size)
        for one in config.sets
    ]


def embed_by_turns(
    embedder: Embedder, face_set: FaceSet, *, indices: Sequence[int] | None = None, **options: Any
) -> "Extraction":
    """`retrieval.extraction.embed_face_set` with every rank reading and embedding its share; equal on all ranks.

    Rank r of W takes the rows r, r + W, ... A collective; arguments and result as there, `on_progress` counts own rows.

    Raises:
        DataError: an image could not be read, or the model gave a value that is not finite, on some rank.
    """
    from retrieval.extraction import Extraction, embed_face_set

    rows = range(len(face_set.keys)) if indices is None else indices
    mine = rows[rank() :: world_size()]
    found, error = None, None
    try:
        # With fewer images than ranks a rank embeds the first image, only to be there.
        found = embed_face_set(embedder, face_set, indices=mine or rows[:1], may_all_fail=True, **options).embeddings
    except DataError as failure:
        error = failure
    if any_rank(error is not None):
        raise error or DataError("Another rank could not embed its share of an evaluation set; its message tells why.")
    assert found is not None  # noqa: S101 - no rank failed
    own = slice(None) if mine else slice(0)
    whole = share_out(np.column_stack([found.embeddings[own], ~found.enrolled[own]]).astype(np.float32), len(rows))
    from retrieval.embeddings import EmbeddingSet

    result = EmbeddingSet(
        embeddings=whole[:, :-1].copy(),
        subject_ids=np.array([face_set.identities[index] for index in rows]),
        keys=np.array([face_set.keys[index] for index in rows]),
        fte=whole[:, -1] > 0,
        metadata=found.metadata,
    )
    return Extraction(result, {})


class _Set(ABC):
    """What measures a set, with a model or without."""

    @abstractmethod
    def _measure(self, embedder: Any, extract: "Callable[..., Extraction]") -> dict[str, float | None]:
        """The numbers; `extract` is called as `embed_by_turns`."""

    def metric_names(self) -> Collection[str]:
        """See `aroface.types.Evaluator`."""
        return [name for name, value in self._measure(None, _draw).items() if value is not None]

    def evaluate(self, embedder: Embedder) -> Mapping[str, float | None]:
        """See `aroface.types.Evaluator`."""
        return self._measure(embedder, embed_by_turns)


class _LfwLq(_Set):
    """Degraded probes among clean faces: rank-1 per size, and the verification of clean pairs."""

    def __init__(self, config: LfwLqSet, batch_size: int) -> None:
        from retrieval.protocols.lfw_lq import LfwLqSettings, split_faces
        from retrieval.protocols.lfw_pairs import draw_pairs
        from shards.faces import open_face_set

        self.name = config.name
        self._faces = open_face_set(Path(config.faces))
        split_faces(self._faces)
        self._pairs = draw_pairs(self._faces.identities)
        self._settings = LfwLqSettings(
            tuple(config.sizes_px), severity=config.severity, flip=config.flip, batch_size=batch_size
        )

    def _measure(self, embedder: Any, extract: "Callable[..., Extraction]") -> dict[str, float | None]:
        from retrieval.protocols.lfw_lq import evaluate_lfw_lq

        record = evaluate_lfw_lq(
            embedder, self._faces, self._settings, pairs=self._pairs, on_progress=_ignore, extract=extract
        )
        return _values(record["metrics"])


class _Verification(_Set):
    """Pairs of a .bin, of a list, or drawn."""

    def __init__(self, config: VerificationSet, batch_size: int) -> None:
        self.name = config.name
        self._faces, self._pairs = _faces_and_pairs(config)
        self._options = {"flip": config.flip, "batch_size": batch_size}

    def _measure(self, embedder: Any, extract: "Callable[..., Extraction]") -> dict[str, float | None]:
        from retrieval.metrics import evaluate_pairs, pair_scores
        from retrieval.protocols.lfw_pairs import fold_accuracy
        from retrieval.results import verification_record

        first, second, same = self._pairs
        used, places = np.unique(np.concatenate([first, second]), return_inverse=True)
        faces = extract(embedder, self._faces, indices=used.tolist(), **self._options).embeddings
        scores = pair_scores(faces, places[: len(first)], places[len(first) :])
        result = evaluate_pairs(scores, same, fars=[float(far) for far in _FARS])
        values = _values(verification_record(result, far_labels=_FARS)["metrics"])
        folds, _ = fold_accuracy(scores, same)
        return values | {"accuracy": None if folds is None else float(folds.mean)}


def _faces_and_pairs(config: VerificationSet) -> "tuple[FaceSet, Pairs]":
    from retrieval.protocols.lfw_pairs import bin_faces, bin_pairs, draw_pairs, read_lfw_pairs

    path = Path(config.faces)
    if path.suffix == ".bin":
        from aroface.bin_file import read_bin_file

        content = read_bin_file(path)
        return bin_faces(content), bin_pairs(content)
    from shards.faces import open_face_set

    faces = open_face_set(path)
    if config.pairs is None:
        return faces, draw_pairs(faces.identities)
    read: Callable[..., tuple[Pairs, list[str]]] = partial(read_lfw_pairs, Path(config.pairs))
    return faces, read(keys=faces.keys, identities=faces.identities, max_missing=config.max_missing_pairs)[0]


def _draw(_: object, face_set: FaceSet, *, indices: Sequence[int], **__: object) -> "Extraction":
    """Vectors drawn in place of embeddings, without a look at the images."""
    from retrieval.embeddings import EmbeddingSet
    from retrieval.extraction import Extraction

    vectors = np.random.default_rng(0).standard_normal((len(indices), 8), np.float32)
    return Extraction(EmbeddingSet(vectors, np.array([face_set.identities[index] for index in indices])), {})


def _values(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers alone; an accuracy at the best threshold of the same pairs goes by the name that says so."""
    values = {name: None if entry["value"] is None else float(entry["value"]) for name, entry in metrics.items()}
    return values | {"accuracy_best_threshold": values.pop("accuracy")}


def _ignore(done: int) -> None:
    pass
