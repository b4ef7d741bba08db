"""What packing can do besides copying: several sources, merges, duplicates, holdouts, changed images."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from aroface.align import align_face
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import DataError
from aroface.images import decode_rgb, encode_jpeg, resize_face
from shards.dataset import ShardDataset
from shards.landmark_file import read_landmarks
from shards.manifest import read_identities, read_manifest
from shards.pack import PackOptions, pack
from shards.prepare import Preparation
from shards.repair import repair
from shards.selection import read_merges
from shards.verify import verify
from tests.helpers.face_folders import write_faces


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def stored(directory: Path) -> dict[str, tuple[bytes, str]]:
    """Image bytes and identity by key."""
    names = [identity.name for identity in read_identities(directory)]
    data = ShardDataset(directory, image_size=16)
    return {
        data.member_name(sample): (bytes(content), names[label])
        for sample in range(data.num_samples)
        for content, label in [data.read(sample)]
    }


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    return write_faces(tmp_path / "one", {"ada": 5, "bob": 2, "cleo": 4})


def test_people_of_two_sources_stay_apart_until_they_are_merged(faces: Path, tmp_path: Path) -> None:
    other = write_faces(tmp_path / "two", {"ada": 3, "dan": 1})
    apart = pack([faces, other], tmp_path / "apart", PackOptions(samples_per_shard=4))
    assert [i.name for i in read_identities(tmp_path / "apart")] == [
        "one/ada",
        "one/bob",
        "one/cleo",
        "two/ada",
        "two/dan",
    ]
    assert (apart.num_samples, apart.source) == (15, "one, two")
    (tmp_path / "merge.csv").write_text("identity,person\ntwo/ada,one/ada\none/bob,Robert\n")
    pack([faces, other], tmp_path / "joined", PackOptions(merges=read_merges(tmp_path / "merge.csv")), workers=2)
    assert [(i.name, i.images) for i in read_identities(tmp_path / "joined")] == [
        ("Robert", 2),
        ("one/ada", 8),
        ("one/cleo", 4),
        ("two/dan", 1),
    ]
    assert rows(tmp_path / "joined" / "identity_map.csv")[1:] == [
        ["0", "one/bob", "one"],
        ["1", "one/ada", "one"],
        ["1", "two/ada", "two"],
        ["2", "one/cleo", "one"],
        ["3", "two/dan", "two"],
    ]
    assert verify(tmp_path / "joined").problems == []
    assert stored(tmp_path / "joined")["two/ada/001.jpg"] == ((other / "ada" / "001.jpg").read_bytes(), "one/ada")


def test_sources_of_one_name_are_refused(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="Two sources are called 'one'"):
        pack([faces, Path(shutil.copytree(faces, tmp_path / "x" / "one"))], tmp_path / "out", PackOptions())


@pytest.fixture
def twins(faces: Path) -> Path:
    """Twice in ada, and one image of bob that is cleo's too."""
    shutil.copy(faces / "ada" / "001.jpg", faces / "ada" / "009.jpg")
    shutil.copy(faces / "bob" / "000.jpg", faces / "cleo" / "009.jpg")
    return faces


def test_equal_images_are_reported(twins: Path, tmp_path: Path) -> None:
    manifest = pack(twins, tmp_path / "out", PackOptions(samples_per_shard=3), workers=2)
    assert (manifest.num_samples, manifest.duplicates, manifest.conflicts) == (13, 2, 1)
    assert rows(tmp_path / "out" / "duplicates.csv") == [
        ["group", "image", "identity", "conflict", "packed"],
        ["0", "ada/001.jpg", "ada", "no", "yes"],
        ["0", "ada/009.jpg", "ada", "no", "yes"],
        ["1", "bob/000.jpg", "bob", "yes", "yes"],
        ["1", "cleo/009.jpg", "cleo", "yes", "yes"],
    ]


def test_equal_images_are_dropped_before_images_are_counted(twins: Path, tmp_path: Path) -> None:
    options = PackOptions(duplicates="drop", min_images=2)
    manifest = pack(twins, tmp_path / "out", options)
    assert (manifest.num_samples, manifest.duplicates, manifest.conflicts) == (9, 2, 1)
    assert [(i.name, i.images) for i in read_identities(tmp_path / "out")] == [("ada", 5), ("cleo", 4)]
    assert [row[4] for row in rows(tmp_path / "out" / "duplicates.csv")[1:]] == ["yes", "no", "no", "no"]
    assert not {"ada/009.jpg", "bob/000.jpg", "cleo/009.jpg"} & set(stored(tmp_path / "out"))


def test_merged_people_have_no_conflict(twins: Path, tmp_path: Path) -> None:
    manifest = pack(twins, tmp_path / "out", PackOptions(merges={"bob": "cleo"}))
    assert (manifest.duplicates, manifest.conflicts) == (2, 0)


def test_a_holdout_and_the_rest_are_the_whole(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {f"id{i:02d}": 1 + i % 3 for i in range(20)})
    parts = {}
    for part in ("rest", "holdout"):
        pack(faces, tmp_path / part, PackOptions(holdout=6, part=part))
        parts[part] = {i.name for i in read_identities(tmp_path / part)}
    assert len(parts["holdout"]) == 6
    assert parts["holdout"] | parts["rest"] == {f"id{i:02d}" for i in range(20)}
    shutil.rmtree(faces / "id00")
    pack(faces, tmp_path / "less", PackOptions(holdout=6, part="holdout"))
    less = {i.name for i in read_identities(tmp_path / "less")}
    assert len(less & parts["holdout"]) >= 5, "a change of the set changes the holdout by no more than itself"
    with pytest.raises(DataError, match="--holdout 20 of 19 identities leaves none on one side"):
        pack(faces, tmp_path / "none", PackOptions(holdout=20))


def test_images_are_resized_or_encoded_anew_only_on_request(faces: Path, tmp_path: Path) -> None:
    large = encode_jpeg(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    (faces / "ada" / "big.png").write_bytes(large)  # a JPEG under another name keeps its bytes
    pack(faces, tmp_path / "as-is", PackOptions())
    assert stored(tmp_path / "as-is")["ada/big.png"][0] == large
    manifest = pack(faces, tmp_path / "small", PackOptions(preparation=Preparation(size=16)))
    assert manifest.image_size == (16, 16)
    small = stored(tmp_path / "small")
    assert small["ada/000.jpg"][0] == (faces / "ada" / "000.jpg").read_bytes()
    assert small["ada/big.jpg"][0] == encode_jpeg(resize_face(decode_rgb(large), 16), quality=95)
    pack(faces, tmp_path / "q", PackOptions(preparation=Preparation(quality=50)))
    first = decode_rgb((faces / "ada" / "000.jpg").read_bytes())
    assert stored(tmp_path / "q")["ada/000.jpg"][0] == encode_jpeg(first, quality=50)
    assert verify(tmp_path / "q").problems == verify(tmp_path / "small").problems == []


def test_what_cannot_be_squared_is_named(faces: Path, tmp_path: Path) -> None:
    (faces / "ada" / "wide.jpg").write_bytes(encode_jpeg(np.zeros((10, 20, 3), np.uint8)))
    with pytest.raises(DataError, match=r"ada/wide.jpg: 20 x 10 pixels cannot become 16 x 16"):
        pack(faces, tmp_path / "out", PackOptions(preparation=Preparation(size=16)))


def test_alignment_by_landmarks_of_a_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (200, 160, 3), np.uint8)
    (tmp_path / "faces" / "ada").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "faces" / "ada" / name).write_bytes(encode_jpeg(pixels))
    points = ARCFACE_TEMPLATE_112 * 1.3 + 5
    text = ",".join(f"{value:.4f}" for value in points.ravel())
    (tmp_path / "points.csv").write_text(f"key,{','.join(f'p{i}' for i in range(10))}\nada/a.jpg,{text}\n")
    options = PackOptions(
        preparation=Preparation(align=True, size=56), landmarks=read_landmarks(tmp_path / "points.csv"), max_bad=1
    )
    manifest = pack(tmp_path / "faces", tmp_path / "out", options)
    assert (manifest.num_samples, manifest.skipped, manifest.image_size) == (1, 1, (56, 56))
    expected = align_face(decode_rgb(encode_jpeg(pixels)), points.astype(np.float32).round(4), size=56)
    found = decode_rgb(stored(tmp_path / "out")["ada/a.jpg"][0])
    assert np.abs(found.astype(int) - decode_rgb(encode_jpeg(expected)).astype(int)).max() <= 2
    [line] = rows(tmp_path / "out" / "skipped.csv")[1:]
    assert line[0] == "ada/b.jpg"
    assert "no landmarks to align it by" in line[1]
    assert manifest.aligned_by == "given landmarks"


def test_the_manifest_tells_by_what_the_images_were_aligned(tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", {"ada": 2})
    text = ",".join(f"{value:.2f}" for value in ARCFACE_TEMPLATE_112.ravel())
    (tmp_path / "list.csv").write_text("".join(f"faces/ada/00{i}.jpg,0,{text}\n" for i in range(2)))
    packed = {
        align: pack(tmp_path / "list.csv", tmp_path / f"{align}", PackOptions(preparation=Preparation(align=align)))
        for align in (True, False)
    }
    assert (packed[True].aligned_by, packed[False].aligned_by) == ("the list", None)
    assert repair(tmp_path / "True", tmp_path / "mended").manifest.aligned_by == "the list"
    path = tmp_path / "False" / "manifest.json"  # as sets of before have it
    path.write_text(path.read_text().replace('  "aligned_by": null,\n', ""))
    assert "aligned_by" not in path.read_text()
    assert read_manifest(tmp_path / "False") == packed[False]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "ada/a.jpg,1,2\n", "line 1: 3 columns; expected key,x1,y1"),
        ("a.csv", "ada/a.jpg" + ",1" * 9 + ",x\n", "line 1: not numbers"),
        ("a.csv", ("ada/a.jpg" + ",1" * 10 + "\n") * 2, "line 2: 'ada/a.jpg' is listed a second time"),
        ("a.csv", "", "holds no landmarks"),
        ("a.json", '{"a": [[1, 2]]}', "'a': five points of finite x and y are needed, found 2 numbers"),
        ("a.json", "[1]", "a JSON list; an object by image name"),
        ("a.json", "{", "cannot be read as JSON"),
    ],
)
def test_unusable_landmarks_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_landmarks(tmp_path / name)


def test_landmarks_of_other_images_are_refused(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="None of the 1 landmarks belongs to an image: they name 'x.jpg', .*'ada/000.jpg'"
    ):
        pack(faces, tmp_path / "out", PackOptions(landmarks={"x.jpg": [0.0] * 10}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ada\n", "line 1: expected identity,person"),
        ("ada,x\nada,y\n", "line 2: 'ada' is given to 'x' already"),
        ("zoe,x\n", "names the identity 'zoe'"),
    ],
)
def test_unusable_merges_are_refused(faces: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "merge.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        pack(faces, tmp_path / "out", PackOptions(merges=read_merges(tmp_path / "merge.csv")))


def test_decoding_finds_what_a_header_hides(faces: Path, tmp_path: Path) -> None:
    path = faces / "ada" / "000.jpg"
    data = bytearray(encode_jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    cut = data[: len(data) // 2] + b"\xff\xd9"
    path.write_bytes(cut)
    pack(faces, tmp_path / "header", PackOptions())
    with pytest.raises(DataError, match="ada/000.jpg"):
        pack(faces, tmp_path / "decode", PackOptions(preparation=Preparation(check="decode")))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"ada/000.jpg: the JPEG is cut short \(no end marker\)"):
        pack(faces, tmp_path / "cut", PackOptions())
