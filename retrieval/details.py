"""What lies behind a result record, search by search or pair by pair: for paired comparisons and failure analysis.

`.npz` without pickles. Pairs: `scores` float32 (P,), `same` bool (P,), `subjects` int64 (P, 2). Searches, one row per
probe and gallery: `probes` (P,) index, `gallery` (P,) 0 or 1, `subjects` (P,), `is_mated`, `best` float32, `rank`
float64. `protocol` is the name of what was evaluated, `rule` how ranks were formed, `preprocessing` the JSON of
how the images were prepared.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path
from retrieval.metrics.search import GallerySearch

__all__ = ["pair_details", "read_details", "search_details", "write_details"]

_COMMON = {"subjects", "protocol", "rule", "preprocessing"}
_KINDS = ({"scores", "same"} | _COMMON, {"rank", "best", "is_mated"} | _COMMON)


def pair_details(
    scores: NDArray[np.float32], same: NDArray[np.bool_], subjects: tuple[NDArray[Any], NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Arrays of compared pairs."""
    return {"scores": scores, "same": same, "subjects": np.stack(subjects, axis=1).astype(np.int64)}


def search_details(searches: Sequence[GallerySearch], subjects: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Arrays of searches of one or two galleries by the same probes."""
    count = len(subjects)
    return {
        "probes": np.tile(np.arange(count), len(searches)),
        "gallery": np.repeat(np.arange(len(searches)), count),
        "subjects": np.tile(subjects, len(searches)),
        "is_mated": np.concatenate([search.is_mated for search in searches]),
        "best": np.concatenate([search.best for search in searches]),
        "rank": np.concatenate([search.rank for search in searches]),
    }


def write_details(
    path: Path, arrays: Mapping[str, NDArray[Any]], *, protocol: str, rule: str, preprocessing: Mapping[str, Any]
) -> None:
    """Write one file, atomically."""
    said = {"protocol": protocol, "rule": rule, "preprocessing": json.dumps(preprocessing)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.array(text) for name, text in said.items()}, **arrays)


def read_details(path: Path) -> dict[str, NDArray[Any]]:
    """Read one file.

    Raises:
        DataError: missing, damaged, or not written by `--details`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise many kinds for a file that is none
        raise DataError(f"{path} cannot be read as a file of --details ({error}).") from error
    if not any(kind <= arrays.keys() for kind in _KINDS):
        raise DataError(f"{path} is no file of --details; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    return arrays
