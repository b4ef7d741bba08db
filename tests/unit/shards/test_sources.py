"""Every layout gives back the images and identities that were put in; every damage is named."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aroface.errors import DataError
from aroface.images import encode_jpeg
from shards.faces import open_face_set
from shards.manifest import read_identities
from shards.pack import PackOptions, pack
from shards.sources import FORMATS, Source, SourceOptions, detect_format, open_source
from shards.verify import verify
from tests.helpers.archives import MAGIC, recordio_frame, tar_bytes, write_recordio, zip_bytes


def face(number: int) -> bytes:
    return encode_jpeg(np.full((16, 16, 3), 10 * number, np.uint8))


FACES = {f"{name}/{i}.jpg": face(10 * k + i) for k, name in enumerate(("ada", "bob")) for i in range(3)}


def content(source: Source) -> dict[str, bytes]:
    entries = list(source.entries())
    return {entry.key: source.read(entry) for entry in entries}


def folder_of(root: Path) -> Path:
    for name, data in FACES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def many(root: Path, suffix: str, build: Callable[[dict[str, bytes]], bytes]) -> Path:
    root.mkdir()
    for number, name in enumerate(("ada", "bob")):
        (root / f"{number}{suffix}").write_bytes(build({k: v for k, v in FACES.items() if k.startswith(name)}))
    return root


def tar_of(members: dict[str, bytes]) -> bytes:
    return tar_bytes(list(members.items()))


def test_folders_and_archives_hold_the_same(tmp_path: Path) -> None:
    written = {
        "folder": folder_of(tmp_path / "folder"),
        "zip": tmp_path / "stored.zip",
        "tar": tmp_path / "faces.tar",
    }
    written["zip"].write_bytes(zip_bytes({f"around/{k}": v for k, v in FACES.items()} | {"around/read.me": b"text"}))
    written["tar"].write_bytes(tar_of({f"./{k}": v for k, v in FACES.items()}))
    for expected, path in written.items():
        assert detect_format(path) == expected
        assert content(open_source(path)) == FACES
    assert detect_format(many(tmp_path / "zips", ".zip", zip_bytes)) == "zip"
    assert detect_format(many(tmp_path / "tars", ".tar", tar_of)) == "tar"
    assert content(open_source(tmp_path / "zips")) == content(open_source(tmp_path / "tars")) == FACES


@pytest.mark.parametrize("layout", ["folder", "zip", "tar"])
def test_sessions_of_two_people_are_not_taken_for_one_person(tmp_path: Path, layout: str) -> None:
    sessions = {f"{who}/s1/{who}.jpg": face(i) for i, who in enumerate(("ada", "bob"))}
    for name, data in sessions.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True)
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "faces.zip").write_bytes(zip_bytes(sessions))
    (tmp_path / "faces.tar").write_bytes(tar_of(sessions))
    path = tmp_path / (layout if layout == "folder" else f"faces.{layout}")
    with pytest.raises(DataError, match=r"'(ada|bob)/s1' and '(ada|bob)/s1' .* 's1'.* Rename one of the two"):
        pack(path, tmp_path / "out", PackOptions())
    apart = pack([tmp_path / "folder" / who for who in ("ada", "bob")], tmp_path / "out", PackOptions())
    assert apart.num_classes == 2


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("zip64", [False, True])
def test_zips_of_every_kind(tmp_path: Path, deflate: bool, zip64: bool) -> None:
    (tmp_path / "a.zip").write_bytes(zip_bytes(FACES, deflate=deflate, zip64=zip64))
    assert content(open_source(tmp_path / "a.zip")) == FACES


def test_the_pieces_of_a_long_table_of_contents_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.sources.zip_file._PIECE_BYTES", 50)
    monkeypatch.setattr("shards.sources.zip_file._LARGEST_RECORD", 100)
    (tmp_path / "a.zip").write_bytes(zip_bytes(FACES, zip64=True))
    assert content(open_source(tmp_path / "a.zip")) == FACES


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: zip_bytes(FACES, flags=1), "ada/0.jpg is encrypted"),
        (lambda: zip_bytes({"a/../../b/1.jpg": b"x"}), "leads out of the collection"),
        (lambda: zip_bytes({"/etc/1.jpg": b"x"}), "leads out of the collection"),
        (lambda: zip_bytes({"a/b\\1.jpg": b"x"}), "leads out of the collection"),
        (lambda: zip_bytes(FACES)[:-30], "not a readable zip file"),
        (lambda: zip_bytes(FACES, claim=1 << 30), "ada/0.jpg unpacks to 1073741824 bytes"),
        (lambda: zip_bytes({"a/1.jpg": bytes(1 << 20)}, deflate=True, claim=1000), "Bad CRC or size"),
        (lambda: zip_bytes(FACES).replace(b"PK\1\2", b"PK\1\3"), "entry 1 of 6 of its table of contents is damaged"),
        (lambda: zip_bytes(FACES).replace(b"PK\3\4", b"PK\3\5"), "no member begins at byte 0"),
        (lambda: b"", "not a readable zip file"),
    ],
)
def test_unusable_zips_are_refused(tmp_path: Path, build: Callable[[], bytes], message: str) -> None:
    (tmp_path / "a.zip").write_bytes(build())
    with pytest.raises(DataError, match=message):
        content(open_source(tmp_path / "a.zip"))


def test_names_of_any_length_in_tars(tmp_path: Path) -> None:
    name = f"{'d' * 60}/{'n' * 120}.jpg"
    long = tar_bytes([("././@LongLink", name.encode() + b"\0")], kind=b"L", end=False) + tar_of({"cut.jpg": face(1)})
    record = f"path={name}\n"
    record = f"{len(record) + 4} {record}"
    pax = tar_bytes([("pax", record.encode())], kind=b"x", end=False) + tar_of({"cut.jpg": face(1)})
    for data in (long, pax):
        (tmp_path / "a.tar").write_bytes(data)
        assert content(open_source(tmp_path / "a.tar", SourceOptions("tar"))) == {name: face(1)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_of(FACES)[:1500], r"ada/0.jpg is cut short|cut short after"),
        (tar_of(FACES)[: 512 + 600], "ada/0.jpg is cut short"),
        (tar_bytes(list(FACES.items()), end=False), "without the mark of its end; it was cut short after bob/2.jpg"),
        (b"x" * 1024, "no tar header after the beginning"),
        (b"\x1f\x8b" + bytes(1000), "compressed tar"),
        (tar_of({"a/../../b/1.jpg": b"x"}), "leads out of the collection"),
        (tar_bytes([("ada/1.jpg", b"")], kind=b"2"), "ada/1.jpg is a link"),
        (tar_of({"1.jpg": b"x"}), "lies in no identity folder"),
    ],
)
def test_unusable_tars_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=message):
        content(open_source(tmp_path / "a.tar"))


def test_recordio(tmp_path: Path) -> None:
    split = b"\xff\xd8\xff\0" + struct.pack("<I", MAGIC) * 2 + b"tail" + struct.pack("<I", MAGIC)
    images = [(face(1), 0.0), (split, 1.0), (face(3), 1.0)]
    root = write_recordio(tmp_path / "set", images, identities=2)
    expected = {"00000000/00000001.jpg": face(1), "00000001/00000002.jpg": split, "00000001/00000003.jpg": face(3)}
    for path in (root, root / "train.rec", root / "train"):
        assert detect_format(path) == "recordio"
        assert content(open_source(path)) == expected
    (root / "train.idx").unlink()
    assert content(open_source(root)) == expected
    plain = write_recordio(tmp_path / "plain", images[:1], identities=1, tables=False)
    assert content(open_source(plain)) == {"00000000/00000000.jpg": face(1)}


def test_recordio_with_several_labels_takes_the_first(tmp_path: Path) -> None:
    record = struct.pack("<IfQQ", 3, 0.0, 0, 0) + struct.pack("<3f", 7, 1, 2) + face(1)
    (tmp_path / "a.rec").write_bytes(recordio_frame(record))
    assert content(open_source(tmp_path)) == {"00000007/00000000.jpg": face(1)}


@pytest.mark.parametrize(
    ("label", "change", "message"),
    [
        (0.5, None, r"record 1: label 0.5 is no class index"),
        (-1.0, None, r"record 1: label -1.0 is no class index"),
        (float("nan"), None, "label nan is no class index"),
        (9.0, None, "label 9, but the property file says 1 classes"),
        (0.0, ("train.idx", lambda d: d.replace(b"1\t40", b"1\t48")), "the .idx belongs to another"),
        (0.0, ("train.idx", lambda d: b"one two\n"), "line 1: expected NUMBER OFFSET"),
        (0.0, ("train.idx", lambda d: b""), "train.idx is empty"),
        (0.0, ("train.rec", lambda d: d[:100]), "cut short"),
        (0.0, ("train.rec", lambda d: d[:20]), "cut short"),
        (0.0, ("property", lambda d: b"many"), "should read classes,height,width"),
    ],
)
def test_unusable_recordio_is_refused(
    tmp_path: Path, label: float, change: tuple[str, Callable[[bytes], bytes]] | None, message: str
) -> None:
    root = write_recordio(tmp_path / "set", [(face(1), label)], identities=1)
    if change is not None:
        path = root / change[0]
        path.write_bytes(change[1](path.read_bytes()))
    with pytest.raises(DataError, match=message):
        content(open_source(root))


@pytest.mark.parametrize(
    "text",
    [
        "ada/0.jpg 0\nada/1.jpg 0\nbob/2.jpg 12\n",
        "ada/0.jpg\t0\r\nada/1.jpg\t0\r\nbob/2.jpg\t12\r\n",
        "label,path\n0,ada/0.jpg\n0,ada/1.jpg\n12,bob/2.jpg\n",
        "\ufeffpath,identity\nada/0.jpg,0\n\nada/1.jpg,0\nbob/2.jpg,12",
    ],
)
def test_lists(tmp_path: Path, text: str) -> None:
    folder_of(tmp_path)
    (tmp_path / "list.txt").write_text(text, newline="")
    found = content(open_source(tmp_path / "list.txt"))
    assert found == {
        "00000000/ada_0.jpg": FACES["ada/0.jpg"],
        "00000000/ada_1.jpg": FACES["ada/1.jpg"],
        "00000012/bob_2.jpg": FACES["bob/2.jpg"],
    }


def test_lists_tell_landmarks_and_names_and_start_from_a_root(tmp_path: Path) -> None:
    folder_of(tmp_path / "images")
    points = [float(i) for i in range(10)]
    lines = [f'"ada/0.jpg","Ada, Countess",{",".join(map(str, points))}', "bob/0.jpg,bob" + "," * 10]
    (tmp_path / "list.csv").write_text("path,name,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n" + "\n".join(lines))
    source = open_source(tmp_path / "list.csv", SourceOptions(root=tmp_path / "images"))
    entries = list(source.entries())
    assert [(e.key, e.landmarks) for e in entries] == [
        ("Ada, Countess/ada_0.jpg", tuple(points)),
        ("bob/0.jpg", None),
    ]
    assert [source.read(e) for e in entries] == [FACES["ada/0.jpg"], FACES["bob/0.jpg"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ada/0.jpg,0\nada/1.jpg\n", "line 2: expected path and label"),
        ("ada/0.jpg,-1\n", "line 1: the label '-1' is no class index"),
        ("ada/0.jpg,0\nada/1.jpg,\n", "line 2: the label '' is no class index"),
        ("0,ada/0.jpg\n", "line 1: '0' is no image path"),
        ("ada/9.jpg,0\n", "names .*ada/9.jpg, which cannot be read: No such file"),
        ("ada/0.jpg,0,1,2,3,4,5,6,7,8,9,x\n", "line 1: expected path and label and ten numbers"),
    ],
)
def test_unusable_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder_of(tmp_path)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        content(open_source(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    ("suffix", "label"),
    [("cls", b"7"), ("txt", b"7\n"), ("json", json.dumps({"height": 112, "label": 7}).encode())],
)
def test_webdataset_tars_of_any_naming(tmp_path: Path, suffix: str, label: bytes) -> None:
    members = [("x/000.face.jpg", b""), ("x/000.jpg", face(1)), (f"x/000.{suffix}", label), ("7.jpg", face(2))]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*members[1:], (f"7.{suffix}", label)]))
    assert detect_format(tmp_path / "a.tar") == "webdataset"
    assert content(open_source(tmp_path / "a.tar")) == {"00000007/x_000.jpg": face(1), "00000007/7.jpg": face(2)}


def test_our_own_shards_are_a_source_with_names(tmp_path: Path) -> None:
    pack(folder_of(tmp_path / "faces"), tmp_path / "out", PackOptions(samples_per_shard=2))
    assert content(open_source(tmp_path / "out", SourceOptions("webdataset"))) == FACES
    pack(tmp_path / "out", tmp_path / "again", PackOptions(samples_per_shard=2))
    assert [i.name for i in read_identities(tmp_path / "again")] == ["ada", "bob"]
    assert verify(tmp_path / "again").problems == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", face(1)), ("a.cls", b"1"), ("b.jpg", face(2))], "sample b has no label"),
        ([("a.cls", b"1")], "sample a holds no image"),
        ([("a.jpg", face(1)), ("a.json", b'{"x": 1}')], "none of the fields identity, label"),
        ([("a.jpg", face(1)), ("a.json", b"{")], ".json member cannot be read"),
        ([("a.jpg", face(1)), ("a.cls", b"")], "is no class index and no name"),
        ([("../a.jpg", face(1)), ("../a.cls", b"1")], "leads out of the collection"),
    ],
)
def test_unusable_webdataset_tars_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataError, match=message):
        content(open_source(tmp_path / "a.tar"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": face(i), "path": f"{i}.jpg"} for i in range(5)]
    parquet.write_table(pyarrow.table({"image": cells, "label": [3, 3, 0, 1, 1]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"img": [face(9)], "who": ["x"]}), tmp_path / "b.parquet", row_group_size=2)
    found = content(open_source(tmp_path / "a.parquet", scratch=tmp_path / "scratch"))
    assert found["00000003/a_00000001.jpg"] == face(1)
    assert found["00000000/a_00000002.jpg"] == face(2)
    manifest = pack(tmp_path / "a.parquet", tmp_path / "out", PackOptions(samples_per_shard=2), workers=2)
    assert (manifest.num_samples, manifest.num_classes) == (5, 3)
    assert verify(tmp_path / "out").problems == []
    with pytest.raises(DataError, match=r"b.parquet has no label \(--label-field\) column.*its columns are img, who"):
        content(open_source(tmp_path / "b.parquet", scratch=tmp_path / "scratch"))
    named = SourceOptions(label_field="who")
    assert list(content(open_source(tmp_path / "b.parquet", named, scratch=tmp_path / "s"))) == ["x/b_00000000.jpg"]
    (tmp_path / "c.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        content(open_source(tmp_path / "c.parquet", scratch=tmp_path / "scratch"))


def test_bin_files_pair_by_pair(tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([face(i) for i in range(4)], [True, False])))
    assert content(open_source(tmp_path / "lfw.bin")) == {
        "pair_00000/00000.jpg": face(0),
        "pair_00000/00001.jpg": face(1),
        "pair_00001_a/00002.jpg": face(2),
        "pair_00001_b/00003.jpg": face(3),
    }


@pytest.mark.parametrize("layout", sorted(FORMATS))
def test_nothing_there_is_said_for_every_layout(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DataError, match=r"does not exist|no RecordIO set"):
        content(open_source(tmp_path / "absent", SourceOptions(layout), scratch=tmp_path))


def test_an_identity_that_is_a_file_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "faces")
    (tmp_path / "faces" / "cleo.jpg").write_bytes(face(1))
    with pytest.raises(DataError, match=r"'cleo.jpg' lies in no identity folder"):
        content(open_source(tmp_path / "faces"))


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path: Path) -> None:
    (folder_of(tmp_path / "faces") / "ada" / "9.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(DataError, match=r"9.jpg cannot be read: No such file or directory.\nMend or remove them"):
        pack(tmp_path / "faces", tmp_path / "out", PackOptions())
    manifest = pack(tmp_path / "faces", tmp_path / "out", PackOptions(max_bad=1))
    assert (manifest.num_samples, manifest.skipped) == (len(FACES), 1)
    faces = open_face_set(tmp_path / "faces")
    with pytest.raises(DataError, match=r"9.jpg cannot be read"):  # `embed` marks it as a failure to enrol
        faces.read(list(faces.keys).index("ada/9.jpg"))


def test_a_link_beside_its_folder_does_not_take_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path / "faces")
    (root / "aaa").symlink_to(root / "ada")
    (root / "0").mkdir()
    (root / "0" / "deep").symlink_to(root / "bob")
    (root / "0" / "loop").symlink_to(root)
    assert content(open_source(root)) == FACES
    assert "0/deep" in caplog.text or "aaa" in caplog.text
    assert "read under another name (3 such in all)" in caplog.text
    elsewhere = tmp_path / "links"
    elsewhere.mkdir()
    (elsewhere / "dan").symlink_to(root / "ada")
    assert set(content(open_source(elsewhere))) == {f"dan/{i}.jpg" for i in range(3)}
