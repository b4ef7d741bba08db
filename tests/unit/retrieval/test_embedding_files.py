"""Embedding files from anywhere: what is wrong with wrong ones is said, and no pickle is ever run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aroface.contract import InputContract
from aroface.errors import DataError
from retrieval.embedding_files import read_embeddings, write_embeddings
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_identification, search_gallery

ROWS = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
GOOD = {"embeddings": ROWS, "subject_ids": np.arange(4)}


class Evil:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def test_a_pickle_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    np.savez(tmp_path / "e.npz", **{**GOOD, "keys": np.array([Evil(mark)] * 4, object)})
    with pytest.raises(DataError, match="without pickles"):
        read_embeddings(tmp_path / "e.npz")
    assert not mark.exists()


def with_nan() -> np.ndarray:
    rows = ROWS.copy()
    rows[2, 1] = np.nan
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": ROWS.astype(np.float16)}, "embeddings are float16; float32 is the format"),
        ({"embeddings": ROWS[0]}, r"must be float32 of shape \(N, D\)"),
        ({"embeddings": with_nan()}, r"1 embedding\(s\) hold NaN or infinity \(row 2 first\)"),
        ({"subject_ids": np.arange(3)}, r"subject_ids has shape \(3,\)"),
        ({"subject_ids": np.arange(4) / 2}, "subject_ids are float64; integers or fixed-width strings"),
        ({"fte": np.zeros(4, np.int64)}, "fte is int64; it must be bool"),
        ({"qualities": np.array([1, 2, np.nan, 4], np.float32)}, "qualities must be finite"),
        ({"variances": np.zeros((4, 6), np.float32)}, "variances must be finite and above 0"),
        ({"variances": np.ones((4, 5), np.float32)}, r"variances has shape \(4, 5\)"),
        ({"subject_ids": np.array(["\u00e9".encode("latin-1")] * 4)}, "subject_ids are bytes beyond ASCII.* as text"),
        ({"template_ids": np.array([b"\xff"] * 4)}, "template_ids are bytes beyond ASCII"),
        ({"det_scores": np.array(["a"] * 4)}, "det_scores are <U1; numbers"),
        ({"qualities": np.array(["a"] * 4)}, "qualities are <U1; numbers"),
        ({"variances": np.array([["a"]] * 4)}, "variances are <U1; numbers"),
        ({"metadata": np.array("model: x")}, "metadata is not JSON"),
        ({"metadata": np.array("[1]")}, "metadata is a JSON list; it must be an object"),
        ({"metadata": np.array('{"contract": "rgb"}')}, "contract is 'rgb'; it must be an object"),
        ({"metadata": np.array('{"model_id": 5}')}, "model_id is 5; it must be a string"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "e.npz", **{**GOOD, **change})
    with pytest.raises(DataError, match=message):
        read_embeddings(tmp_path / "e.npz")


def test_an_input_contract_in_another_form_is_named() -> None:
    contract = {"image_size": 112, "colour_order": "rgb"}
    assert EmbeddingSet(ROWS, np.arange(4)).contract is None
    assert EmbeddingSet(ROWS, np.arange(4), metadata={"contract": contract}).contract == InputContract(**contract)
    other = EmbeddingSet(ROWS, np.arange(4), metadata={"contract": {**contract, "colour_order": "grey"}}, name="e.npz")
    with pytest.raises(DataError, match=r"e.npz: metadata, contract.colour_order: .*mend it, or leave it out"):
        _ = other.contract


def test_missing_arrays_and_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", embeddings=ROWS)
    with pytest.raises(DataError, match="lacks subject_ids; it holds embeddings"):
        read_embeddings(tmp_path / "e.npz")
    with pytest.raises(DataError, match="does not exist; `aroface embed` writes"):
        read_embeddings(tmp_path / "none.npz")
    (tmp_path / "t.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"cannot be read as an embedding file \(no zip archive"):
        read_embeddings(tmp_path / "t.npz")


def test_nan_of_a_row_that_is_marked_is_a_failure_to_enrol() -> None:
    marked = EmbeddingSet(with_nan(), np.arange(4), fte=np.arange(4) == 2)
    assert marked.enrolled.tolist() == [True, True, False, True]
    assert np.isfinite(marked.unit()).all()
    assert np.isneginf(marked.quality[2])


def test_every_column_survives_a_round_trip(tmp_path: Path) -> None:
    whole = EmbeddingSet(
        ROWS,
        np.array(list("abca")),
        template_ids=np.arange(4) + 10,
        media_ids=np.array(list("xxyy")),
        det_scores=np.linspace(0, 1, 4, dtype=np.float32),
        fte=np.array([False, True, False, False]),
        keys=np.array([f"{i}.jpg" for i in range(4)]),
        qualities=np.arange(4, dtype=np.float32),
        variances=np.ones((4, 1), np.float32),
        metadata={"model_id": "m"},
    )
    write_embeddings(tmp_path / "e.npz", whole)
    found = read_embeddings(tmp_path / "e.npz")
    for name in ("subject_ids", "template_ids", "media_ids", "det_scores", "fte", "keys", "qualities", "variances"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert found.metadata == {"model_id": "m"}


def test_names_on_one_side_and_numbers_on_the_other_find_nobody_and_are_refused() -> None:
    gallery, probes = EmbeddingSet(ROWS, np.arange(4)), EmbeddingSet(ROWS, np.array(list("0123")))
    with pytest.raises(DataError, match="nobody would be found. Use integers in both"):
        search_gallery(gallery, probes)
    with pytest.raises(DataError, match="they come from different models"):
        search_gallery(gallery, EmbeddingSet(ROWS[:, :3], np.arange(4)))


def test_zero_vectors_are_failures_on_either_side() -> None:
    rows = ROWS.copy()
    rows[1] = 0
    gallery = EmbeddingSet(rows, np.arange(4))
    result = evaluate_identification([gallery], gallery, ranks=(1,), fpirs=())
    assert result.ranks[0][1] == 3 / 4  # the zero probe is a miss at every rank, and nobody is found through a zero
    assert (result.num_probe_failures, result.num_gallery_failures) == (1, 1)
    assert result.searches[0].rank[1] == np.inf
