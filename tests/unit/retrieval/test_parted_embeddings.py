"""A folder of embeddings is read part by part, and nothing depends on it."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedding_files import read_embeddings, write_embeddings, write_index
from retrieval.embeddings import EmbeddingSet
from retrieval.parted_embeddings import PartedEmbeddings
from retrieval.protocols.collection import EmbeddedCollection
from tests.helpers.protocol_sets import embeddings_of, write_ijbs, write_keyed
from tests.integration.test_protocol_commands import evaluate


def write_folder(folder: Path, embeddings: EmbeddingSet, parts: int, *, rated: bool = True) -> Path:
    (folder / "parts").mkdir(parents=True)
    names = []
    for number, rows in enumerate(np.array_split(np.arange(len(embeddings)), parts)):
        names.append(f"parts/part-{number:05d}.npz")
        part = embeddings.take(rows)
        qualities = rows.astype(np.float32) if rated or number else None
        columns = {"keys": part.keys, "fte": part.fte, "qualities": qualities, "metadata": part.metadata}
        write_embeddings(folder / names[-1], EmbeddingSet(part.embeddings, part.subject_ids, **columns))
    write_index(folder, names)
    return folder


@pytest.mark.parametrize("rated", [True, False])
def test_rows_in_any_order_are_those_of_the_whole(tmp_path: Path, rated: bool) -> None:
    generator = np.random.default_rng(0)
    keys = np.array([f"{i:03d}.jpg" for i in range(50)])
    values = generator.normal(size=(50, 6)).astype(np.float32)
    written = EmbeddingSet(values, np.arange(50), keys=keys, fte=np.arange(50) == 17, metadata={"model_id": "m"})
    folder = write_folder(tmp_path / "e", written, 7, rated=rated)
    whole, parted = read_embeddings(folder), PartedEmbeddings(folder)
    assert len(parted) == 50
    assert parted.metadata == whole.metadata
    assert parted.keys is not None
    assert parted.keys.tolist() == keys.tolist()
    for _ in range(5):
        rows = generator.integers(0, 50, 30)
        one, other = parted.take(rows), whole.take(rows)
        np.testing.assert_array_equal(one.embeddings, other.embeddings)
        for column in ("subject_ids", "keys", "fte"):
            np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
        assert (one.qualities is None) == (other.qualities is None) == (not rated)
        if rated:
            np.testing.assert_array_equal(one.qualities, other.qualities)


def test_ijbs_from_a_folder_is_ijbs_from_a_file(tmp_path: Path) -> None:
    keys, people = write_ijbs(tmp_path / "cs6")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=3.0))
    folder = write_folder(tmp_path / "e", read_embeddings(file), 9)
    source = ["--task", "surveillance_to_single", "--protocol", tmp_path / "cs6", "--resamples", 0]
    whole = evaluate(tmp_path, "ijbs", *source, "--embeddings", file)
    parted = evaluate(tmp_path, "ijbs", *source, "--embeddings", folder)
    assert 0 < whole["metrics"]["rank_1"]["value"] < 1
    assert parted["metrics"] == whole["metrics"]
    assert parted["counts"] == whole["counts"]


def test_memory_is_that_of_a_few_parts(tmp_path: Path) -> None:
    count, dim = 40_000, 64
    keys = np.array([f"{i:06d}" for i in range(count)])
    values = np.ones((count, dim), np.float32)
    folder = write_folder(tmp_path / "e", EmbeddingSet(values, np.zeros(count, int), keys=keys), 40)

    def peak(embeddings: type[PartedEmbeddings] | None) -> int:
        tracemalloc.start()
        try:
            source = read_embeddings(folder) if embeddings is None else embeddings(folder)
            total = sum(len(rows) for rows, _ in EmbeddedCollection(source).chunks(keys, np.arange(count)))
            assert total == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    saved = peak(None) - peak(PartedEmbeddings)
    assert saved > 0.5 * values.nbytes
