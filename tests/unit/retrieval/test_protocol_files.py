"""Readers of protocol files: the real lists where they are at hand, and what is wrong with wrong ones."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.protocols import text_tables
from retrieval.protocols.collection import EmbeddedCollection, natural_embeddings
from retrieval.protocols.ijb import (
    IjbPairs,
    read_ijb_pairs,
    read_ijb_samples,
    read_template_list,
    subjects_of_pairs,
)
from retrieval.protocols.ijbs import read_ijbs
from retrieval.protocols.lfw_pairs import is_list_of_files, read_file_pairs, read_lfw_pairs
from retrieval.protocols.scface import find_scface
from retrieval.protocols.survface import read_survface
from retrieval.protocols.text_tables import read_integers
from retrieval.protocols.tinyface import COUNTS, read_tinyface_lists
from shards.faces import ImageFolder
from tests.helpers.protocol_sets import cells, write_ijb, write_ijbs, write_survface, write_tinyface

REAL = Path(__file__).parents[4] / "shared" / "protocols"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real protocol files are not here")


@real
def test_the_real_tinyface_lists() -> None:
    lists = read_tinyface_lists(REAL)
    assert (len(lists.probes), len(lists.matches)) == (COUNTS["probes"], COUNTS["gallery_match"])
    assert set(lists.probe_ids.tolist()) <= set(lists.match_ids.tolist())  # closed set


@real
@pytest.mark.parametrize(("part", "templates"), [("G1", 1772), ("G2", 1759)])
def test_the_real_ijbc_galleries(part: str, templates: int) -> None:
    listed = read_template_list(REAL / f"ijbc_1N_gallery_{part}.csv")
    assert len(listed.template_ids) == len(set(listed.subject_ids.tolist())) == templates


@real
def test_the_real_pair_lists() -> None:
    names = [line.split()[0] for line in (REAL / "pairs_CPLFW.txt").read_text().splitlines()[1:]]
    keys = sorted(set(names))
    assert is_list_of_files(REAL / "pairs_CPLFW.txt")
    first, second, same = read_file_pairs(REAL / "pairs_CPLFW.txt", keys=keys)
    assert [int(fold.sum()) for fold in np.array_split(same, 10)] == [300] * 10
    listed = {(a, b) for a, b in zip(names[::2], names[1::2], strict=True)}
    assert {(keys[a], keys[b]) for a, b in zip(first, second, strict=True)} == listed
    assert not is_list_of_files(REAL / "lfw_pairs.txt")
    rows = [line.split("\t") for line in (REAL / "lfw_pairs.txt").read_text().splitlines()[1:]]
    images = {(row[0], row[1]) for row in rows} | {(row[-2] if len(row) == 4 else row[0], row[-1]) for row in rows}
    keys = [f"{name}/{name}_{int(number):04d}.jpg" for name, number in sorted(images)]
    (first, _, same), missing = read_lfw_pairs(
        REAL / "lfw_pairs.txt", keys=keys, identities=[key.split("/")[0] for key in keys]
    )
    assert (len(first), int(same.sum()), missing) == (6000, 3000, [])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("face_tid_mid", lambda t: t[: t.rindex("\n", 0, -1) + 1], "has 55 rows, ijbc_name_5pts_score.txt 56"),
        ("face_tid_mid", lambda t: t.replace("2.jpg", "x.jpg", 1), "Row 2: ijbc_face_tid_mid.txt names 'x.jpg'"),
        ("face_tid_mid", lambda t: t.replace("1.jpg 100", "1.jpg Anna", 1), "template id 'Anna' is no whole number"),
        (
            "face_tid_mid",
            lambda t: t.replace("1.jpg 100", "1.jpg", 1),
            "line 1: '1.jpg 1' is not `image template",
        ),
        ("name_5pts_score", lambda t: t.replace("38.2946", "left", 1), "landmarks and scores must be numbers"),
        ("name_5pts_score", lambda t: t.replace(" 38.2946", "", 1), "line 1 has 11 fields"),
    ],
)
def test_unusable_ijb_lists(tmp_path: Path, name: str, change: Callable[[str], str], message: str) -> None:
    write_ijb(tmp_path / "meta")
    path = tmp_path / "meta" / f"ijbc_{name}.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError) as error:
        read_ijb_samples(tmp_path / "meta", "ijbc")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 1\n1 2\n", "line 2: '1 2' is not"),
        ("1 two 1\n", "line 1: '1 two 1' is not"),
        ("1 2 3\n", "label 3; 1 is genuine, 0 impostor"),
        ("1 2 1\n1 9 0\n", "line 2: template 9 has no samples"),
        ("", "is empty"),
    ],
)
def test_unusable_pairs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError) as error:
        read_ijb_pairs(tmp_path / "pairs.txt", np.array([1, 2, 3]))
    assert message in str(error.value)


def test_pairs_in_both_notations(tmp_path: Path) -> None:
    for number, text in enumerate(("1 2 1\r\n3 1 0\r\n", "1,2,1\n3,1,0")):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.encode())
        pairs = read_ijb_pairs(path, np.array([1, 2, 3]))
        assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([0, 2], [1, 0], [True, False])


def test_subjects_are_what_genuine_pairs_join() -> None:
    first, second = np.array([0, 1, 3, 0], np.int32), np.array([1, 2, 4, 3], np.int32)
    codes = subjects_of_pairs(IjbPairs(first, second, np.array([True, True, True, False])), 6)
    assert codes[0] == codes[1] == codes[2] != codes[3] == codes[4] != codes[5]
    wrong = IjbPairs(np.array([0, 1, 0]), np.array([1, 2, 2]), np.array([True, True, False]))
    with pytest.raises(DataError, match="the labels contradict"):
        subjects_of_pairs(wrong, 3)


def test_a_template_with_two_subjects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("template_id,SUBJECT_ID\n5,1\n6,2\n5,3\n")
    with pytest.raises(DataError, match="template 5 has the subjects 1 and 3"):
        read_template_list(tmp_path / "list.csv")


def test_unusable_tinyface_lists(tmp_path: Path) -> None:
    write_tinyface(tmp_path / "lists")
    path = tmp_path / "lists" / "probe_img_ID_pairs.mat"
    for names, ids, message in (
        (["1_1.jpg", "1_1.jpg"], [1, 1], "lists '1_1.jpg' twice"),
        (["1_1.jpg"], [-100], "identity -100 is not positive"),
        (["1_1.jpg"], [1, 2], "1 names in 'probe_set', but 2 numbers"),
    ):
        savemat(path, {"probe_set": cells(names), "probe_ids": np.array(ids)[:, None]})
        with pytest.raises(DataError, match=message):
            read_tinyface_lists(tmp_path / "lists")
    savemat(path, {"other": 1})
    with pytest.raises(DataError, match="no variable 'probe_set'; it holds other"):
        read_tinyface_lists(tmp_path / "lists")
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        read_tinyface_lists(tmp_path / "lists")


def test_a_survface_image_listed_twice_is_refused(tmp_path: Path) -> None:
    write_survface(tmp_path / "lists")
    path = tmp_path / "lists" / "mated_probe_img_ID_pairs.mat"
    savemat(path, {"mated_probe_set": cells(["1_a.jpg", "1_a.jpg"]), "mated_probe_ids": np.array([[1], [1]])})
    with pytest.raises(DataError, match="lists '1_a.jpg' twice"):
        read_survface(tmp_path / "lists")


SINGLE = "galleries/cs6_surveillance_to_single"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{SINGLE}_g2.csv", lambda t: t + "9,1,img/101.png\n", "Subject 1 is in"),
        (
            "cs6_surveillance_to_single-booking_probe.csv",
            lambda t: t + "videos/99.mp4\n",
            "lists 'videos/99', in",
        ),
        ("cs6_metadata.csv", lambda t: t.replace("SUBJECT_ID", "PERSON"), "has no column 'SUBJECT_ID'"),
        (
            f"{SINGLE}_g1.csv",
            lambda t: t + "9,2,videos/21.mp4\n",
            "is a probe and in the gallery",
        ),
        (
            f"{SINGLE}_g1.csv",
            lambda t: t + "9,2,faces/21.jpg\n",
            "neither videos/NAME nor img",
        ),
    ],
)
def test_unusable_ijbs_files(tmp_path: Path, name: str, change: Callable[[str], str], message: str) -> None:
    keys, _ = write_ijbs(tmp_path / "cs6")
    path = tmp_path / "cs6" / name
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError) as error:
        read_ijbs(tmp_path / "cs6", "surveillance_to_single", keys)
    assert message in str(error.value)


IJBS_PROBES = "cs6_surveillance_to_single-booking_probe.csv"


@pytest.mark.parametrize("first", ["video/11.mp4", "11.mp4", "5004", "videos", "videos11.mp4", "videos/11.mp4/x", ",y"])
def test_a_malformed_first_probe_of_ijbs_is_no_header(tmp_path: Path, first: str) -> None:
    keys, _ = write_ijbs(tmp_path / "cs6")
    path = tmp_path / "cs6" / IJBS_PROBES
    path.write_text(path.read_text().replace("FILENAME", first))
    with pytest.raises(DataError, match=rf"{IJBS_PROBES}, line 1: .* is neither videos/NAME nor img/NAME"):
        read_ijbs(tmp_path / "cs6", "surveillance_to_single", keys)


@pytest.mark.parametrize("header", ["FILENAME\n", "filename,x\n", "\ufeffVIDEO_NAME\r\n", "file name\n", ""])
def test_the_name_of_the_column_is_no_probe_of_ijbs(tmp_path: Path, header: str) -> None:
    keys, _ = write_ijbs(tmp_path / "cs6")
    path = tmp_path / "cs6" / IJBS_PROBES
    expected = read_ijbs(tmp_path / "cs6", "surveillance_to_single", keys).probes
    path.write_text(path.read_text().replace("FILENAME\n", header))
    assert read_ijbs(tmp_path / "cs6", "surveillance_to_single", keys).probes == expected
    path.write_text(path.read_text() + "FILENAME\n")  # anywhere else it is no header
    line = len(path.read_text().splitlines())
    with pytest.raises(DataError, match=rf"{IJBS_PROBES}, line {line}: 'FILENAME' is neither"):
        read_ijbs(tmp_path / "cs6", "surveillance_to_single", keys)


def test_ijbs_templates_do_not_depend_on_the_order_of_samples(tmp_path: Path) -> None:
    keys, _ = write_ijbs(tmp_path / "cs6")
    one = read_ijbs(tmp_path / "cs6", "surveillance_to_booking", keys)
    other = read_ijbs(tmp_path / "cs6", "surveillance_to_booking", keys[::-1])
    assert one.samples.keys.tolist() == other.samples.keys.tolist()
    assert one.samples.template_ids.tolist() == other.samples.template_ids.tolist()
    with pytest.raises(DataError, match="No sample is called"):
        read_ijbs(tmp_path / "cs6", "surveillance_to_booking", ["a.jpg"])


def test_multi_view_takes_the_listed_videos_or_all(tmp_path: Path) -> None:
    keys, _ = write_ijbs(tmp_path / "cs6")
    listed = read_ijbs(tmp_path / "cs6", "multiview_to_booking", keys)
    everything = read_ijbs(tmp_path / "cs6", "multiview_to_booking", keys, all_videos=True)
    media = [set(plan.samples.media[plan.samples.template == plan.probes[0]].tolist()) for plan in (listed, everything)]
    assert media == [{"videos/11", "videos/12"}, {"videos/11", "videos/12", "videos/13"}]


def test_scface_names() -> None:
    with pytest.raises(DataError, match="two mugshots"):
        find_scface(["001_frontal.jpg", "001_frontal.png", "001_cam1_1.jpg"])
    with pytest.raises(DataError, match="lacks one or the other"):
        find_scface(["001_frontal.jpg"])
    with pytest.raises(DataError, match="Subject 002 has no mugshot"):
        find_scface(["001_frontal.jpg", "001_cam1_1.jpg"], subjects={2})
    with pytest.raises(DataError, match="Subject 002 has no mugshot"):
        find_scface(["001_frontal.jpg", "001_cam1_1.jpg", "002_cam1_1.jpg"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 1\n3 4 0\n", None),
        ("1,2,1\r\n\r\n3,4,0", None),
        ("1 2\n1 3 1 0\n", "line 1: '1 2' is not"),
        ("1 2 1\n1 3 1 0\n5 6\n", "line 2: '1 3 1 0' is not"),
        ("1 4294967298 1\n", "4294967298 is too large"),
        ("1 2 x\n", "line 1: '1 2 x' is not"),
    ],
)
def test_every_line_holds_its_numbers(tmp_path: Path, text: str, message: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(text_tables, "_CHECKED_BYTES", 8)  # several blocks
    path = tmp_path / "pairs.txt"
    path.write_bytes(text.encode())
    if message is None:
        assert read_integers(path, columns=3, what="`template template label`").tolist() == [[1, 2, 1], [3, 4, 0]]
        return
    with pytest.raises(DataError, match=message):
        read_integers(path, columns=3, what="`template template label`")


def test_a_detector_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_ijb(tmp_path / "ijb")
    path = next(tmp_path.rglob("ijbc_name_5pts_score.txt"))
    lines = path.read_text().splitlines()
    lines[2] = lines[2].rpartition(" ")[0] + " nan"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 3: landmarks and scores must be finite"):
        read_ijb_samples(path.parent, "ijbc")


def test_embeddings_of_other_images_are_refused() -> None:
    rows = np.ones((2, 4), np.float32)
    named = EmbeddedCollection(EmbeddingSet(rows, np.zeros(2, int), keys=np.array(["a/1.jpg", "a/2.jpg"])))
    with pytest.raises(DataError, match=r"it asks for 'b/1.jpg', there are 'a/1.jpg'"):
        natural_embeddings(named, np.array(["b/1.jpg"]), np.zeros(1, int), name="probes")
    unnamed = EmbeddedCollection(EmbeddingSet(rows, np.zeros(2, int)))
    with pytest.raises(DataError, match="has 2 rows and no `keys`; the protocol lists 3"):
        natural_embeddings(unnamed, np.array(["a", "b", "c"]), np.zeros(3, int), name="probes")
    with pytest.raises(DataError, match="two rows have one key"):
        EmbeddedCollection(EmbeddingSet(rows, np.zeros(2, int), keys=np.array(["a", "a"])))
    part = natural_embeddings(named, np.array(["a/2.jpg", "a/9.jpg"]), np.arange(2), name="probes")
    assert part.enrolled.tolist() == [True, False]
    assert named.missing == 1


def test_a_folder_of_images_without_any_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of images"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(DataError, match="holds no images"):
        ImageFolder(tmp_path)
