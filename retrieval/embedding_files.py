"""Embedding files (`.npz`), one alone or a folder of parts: what `aroface embed` writes. No pickle, ever.

embeddings    float32 (N, D), un-normalised
subject_ids   (N,) integers or fixed-width strings
template_ids, media_ids (N,), det_scores float32 (N,), fte bool (N,), keys (N,)    optional
qualities     float32 (N,), larger is better; variances float32 (N, D) or (N, 1)   optional
metadata      0-d string, JSON: model id, contract, flip                           optional

A folder holds `parts/part-NNNNN.npz`, each such a file, and `index.json`, which is written last: format_version, rows,
embedding_dim, and for every part in order its file, rows and sha256.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import atomic_path, read_json, sha256_of, write_json
from retrieval.embeddings import OPTIONAL_COLUMNS, EmbeddingSet

__all__ = ["INDEX_NAME", "iterate_embeddings", "part_readers", "read_embeddings", "write_embeddings", "write_index"]

INDEX_NAME = "index.json"
_FORMAT_VERSION = 1


def write_embeddings(path: Path, embeddings: EmbeddingSet) -> None:
    """Write one embedding file, atomically."""
    arrays = {"embeddings": embeddings.embeddings, "subject_ids": embeddings.subject_ids}
    arrays |= {key: array for key in OPTIONAL_COLUMNS if (array := getattr(embeddings, key)) is not None}
    arrays["metadata"] = np.array(json.dumps(dict(embeddings.metadata)))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_index(folder: Path, parts: Sequence[str]) -> None:
    """Declare a folder of parts whole: measure every part and write `index.json`, atomically.

    Args:
        folder: where `parts/` lies.
        parts: paths relative to the folder, in the order of the rows.

    Raises:
        DataError: a part cannot be read, or has another dimension than the first.
    """
    entries: list[dict[str, Any]] = []
    dims: dict[int, str] = {}
    for name in parts:
        part = _read_file(folder / name)
        dims.setdefault(part.embeddings.shape[1], name)
        entries.append({"file": name, "rows": len(part), "sha256": sha256_of(folder / name)})
    if len(dims) != 1:
        raise DataError(
            f"{folder}: the parts differ in dimension ({', '.join(f'{n}: D = {d}' for d, n in dims.items())})."
        )
    rows = sum(entry["rows"] for entry in entries)
    write_json(
        folder / INDEX_NAME,
        {"format_version": _FORMAT_VERSION, "rows": rows, "embedding_dim": next(iter(dims)), "parts": entries},
    )


def read_embeddings(path: Path) -> EmbeddingSet:
    """Read and check one embedding file, or all parts of a folder.

    Raises:
        DataError: missing, not an .npz, a key missing, pickled content, arrays that contradict one another; a folder
            without index, of another format version, or with a part that differs from the index.
    """
    return _read_folder(path) if path.is_dir() else _read_file(path)


def iterate_embeddings(path: Path) -> Iterator[EmbeddingSet]:
    """One embedding file, or the parts of a folder one after the other: only one of them is in memory at a time.

    Raises:
        DataError: as `read_embeddings`.
    """
    if not path.is_dir():
        yield _read_file(path)
        return
    for read in part_readers(path):
        yield read()


def part_readers(folder: Path) -> list[Callable[[], EmbeddingSet]]:
    """One function per part, in the order of the rows, that reads and checks it.

    Raises:
        DataError: as `read_embeddings`; what is wrong with a part is raised where it is read.
    """
    rows, dimension, entries = _read_index(folder)
    total = sum(count for _, count, _ in entries)
    if total != rows:
        raise DataError(f"{folder / INDEX_NAME} says {rows} rows, its parts have {total}.")
    return [partial(_read_alone, folder / name, count, dimension, digest) for name, count, digest in entries]


def _read_alone(path: Path, rows: int, dimension: int, digest: str) -> EmbeddingSet:
    part = _read_part(path, rows, digest, 0, np.empty((rows, dimension), np.float32))
    return replace(part, name=str(path))


def _read_index(folder: Path) -> tuple[int, int, list[tuple[str, int, str]]]:
    """Rows, dimension, and (file, rows, sha256) of each part."""
    if not (folder / INDEX_NAME).is_file():
        raise DataError(
            f"{folder} has no {INDEX_NAME}: `aroface embed` has not finished there, or it is another folder. The same "
            "command goes on where it stopped."
        )
    index = read_json(folder / INDEX_NAME)
    if index.get("format_version") != _FORMAT_VERSION:
        raise DataError(
            f"{folder / INDEX_NAME} has format version {index.get('format_version')!r}; this version reads "
            f"{_FORMAT_VERSION}."
        )
    try:
        entries = [(str(entry["file"]), int(entry["rows"]), str(entry["sha256"])) for entry in index["parts"]]
        return int(index["rows"]), int(index["embedding_dim"]), entries
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / INDEX_NAME} is no index of embeddings ({error!r}).") from error


def _read_folder(folder: Path) -> EmbeddingSet:
    rows, dimension, entries = _read_index(folder)
    values = np.empty((rows, dimension), np.float32)
    columns: dict[str, list[NDArray[Any]]] = {key: [] for key in ("subject_ids", *OPTIONAL_COLUMNS)}
    metadata: Mapping[str, Any] = {}
    start = 0
    for name, count, digest in entries:
        part = _read_part(folder / name, count, digest, start, values)
        start += count
        metadata = metadata or part.metadata
        for key, arrays in columns.items():
            if (array := getattr(part, key)) is not None:
                arrays.append(array)
    if start != len(values):
        raise DataError(f"{folder / INDEX_NAME} says {len(values)} rows, its parts have {start}.")
    joined = {key: np.concatenate(arrays) for key, arrays in columns.items() if len(arrays) == len(entries)}
    return EmbeddingSet(values, **joined, metadata=metadata, name=str(folder))


def _read_part(path: Path, rows: int, digest: str, start: int, values: NDArray[np.float32]) -> EmbeddingSet:
    """Copy the embeddings of one part to their rows of `values`; the part without memory of its own."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; the index lists it.") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(
            f"{path} is not the file that the index lists (SHA-256 differs). Delete it and {INDEX_NAME}, "
            "and run the same `aroface embed` again: it makes that part anew."
        )
    part = _read_file(path, io.BytesIO(data))
    if part.embeddings.shape != (rows, values.shape[1]):
        raise DataError(f"{path} holds embeddings {part.embeddings.shape}; the index says ({rows}, {values.shape[1]}).")
    own = values[start : start + rows]
    own[:] = part.embeddings
    return replace(part, embeddings=own)


def _read_file(path: Path, data: BinaryIO | None = None) -> EmbeddingSet:
    try:
        if data is None and path.is_file() and not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("no zip archive, as every .npz is")
        with np.load(path if data is None else data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; `aroface embed` writes embedding files.") from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as an embedding file ({error}). "
            "It must be an .npz of plain arrays, without pickles."
        ) from error
    missing = [key for key in ("embeddings", "subject_ids") if key not in arrays]
    if missing:
        raise DataError(f"{path} lacks {' and '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    known = {key: arrays[key] for key in OPTIONAL_COLUMNS if key in arrays}
    metadata = _metadata(path, arrays["metadata"]) if "metadata" in arrays else {}
    embeddings = arrays["embeddings"]
    if embeddings.dtype in (np.float16, np.float64):
        raise DataError(
            f"{path}: embeddings are {embeddings.dtype}; float32 is the format. Convert them once and save."
        )
    return EmbeddingSet(embeddings, arrays["subject_ids"], **known, metadata=metadata, name=str(path))


def _metadata(path: Path, text: NDArray[Any]) -> dict[str, Any]:
    try:
        found = json.loads(str(text))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: metadata is not JSON ({error}). Write an object such as {{}} as text, or leave it out."
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: metadata is a JSON {type(found).__name__}; it must be an object, or be left out.")
    for key, kind, name in (("model_id", str, "a string"), ("contract", dict, "an object")):
        if not isinstance(found.get(key), kind | None):
            raise DataError(f"{path}: metadata, {key} is {found[key]!r:.60}; it must be {name}, or be left out.")
    return found
