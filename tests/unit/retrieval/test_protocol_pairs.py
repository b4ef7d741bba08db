"""Lists of pairs by row and in LFW's format, and pairs drawn from a set."""

from pathlib import Path

import numpy as np
import pytest

from aroface.errors import DataError
from retrieval.pairs import read_index_pairs
from retrieval.protocols.lfw_pairs import draw_pairs, read_lfw_pairs

KEYS = ["Ann/Ann_0001.jpg", "Ann/Ann_0012.jpg", "Bo/Bo_0001.jpg", "Cy/portrait.jpg"]
NAMES = ["Ann", "Ann", "Bo", "Cy"]


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("header", ["", "1\n", "10\t300\n"])
def test_both_forms_are_read_and_a_header_is_skipped(tmp_path: Path, header: str) -> None:
    path = _write(tmp_path, f"{header}Ann\t1\t12\nAnn\t12\tBo\t1\n\n")
    (first, second, same), missing = read_lfw_pairs(path, keys=KEYS, identities=NAMES)
    assert (first.tolist(), second.tolist(), same.tolist()) == ([0, 1], [1, 2], [True, False])
    assert missing == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ann\t1\t12\nAnn\t1\tBo\t7\n", r"line 2: the set has 0 images number 7 of Bo, not one\. Take the list"),
        ("Ann 1 12\n", r"line 1: 'Ann 1 12' is neither `name i j`"),
        ("Ann\tx\t12\n", "line 1: .* is neither"),
        ("", "lists no pairs; a line is"),
    ],
)
def test_bad_lists_are_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_lfw_pairs(_write(tmp_path, text), keys=KEYS, identities=NAMES)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        read_lfw_pairs(tmp_path / "nowhere.txt", keys=KEYS, identities=NAMES)


def test_missing_images_are_left_out_within_the_budget(tmp_path: Path) -> None:
    path = _write(tmp_path, "Ann\t1\t12\nAnn\t1\tBo\t7\nDee\t1\tBo\t1\n")
    (first, _, _), missing = read_lfw_pairs(path, keys=KEYS, identities=NAMES, max_missing=2)
    assert (len(first), len(missing)) == (1, 2)
    with pytest.raises(DataError, match=r"line 3.*--max-missing-pairs \(now 1\)"):
        read_lfw_pairs(path, keys=KEYS, identities=NAMES, max_missing=1)


def test_drawn_pairs_are_balanced_and_what_they_say() -> None:
    names = np.array([f"p{i % 13}" for i in range(80)])
    first, second, same = draw_pairs(names.tolist(), most=40)
    assert same.sum() == (~same).sum() == 40
    np.testing.assert_array_equal(names[first] == names[second], same)
    assert (first != second).all()
    assert len(set(second[same].tolist())) == 40
    np.testing.assert_array_equal(draw_pairs(names.tolist(), most=40)[0], first)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "a"]])
def test_a_set_without_pairs_is_refused(names: list[str]) -> None:
    with pytest.raises(DataError, match="Pairs need two persons"):
        draw_pairs(names)


@pytest.mark.parametrize("wrong", ["0,99999999999999999999,0", "-9223372036854775809,1,1", "0,1.5,1", "0,1"])
def test_a_pair_that_is_not_in_whole_numbers_is_named(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"index_a,index_b,label\n0,1,1\n{wrong}\n")
    with pytest.raises(DataError, match=rf"pairs.csv, line 3: '{wrong}' is not .* in whole numbers"):
        read_index_pairs(path, num_rows=2)
