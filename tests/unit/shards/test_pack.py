import fcntl
import zipfile
from pathlib import Path

import pytest
import webdataset

from aroface.errors import DataError
from aroface.files import sha256_of
from shards.faces import open_face_set
from shards.manifest import read_identities
from shards.pack import PackOptions, pack
from shards.pack_worker import PackWorker
from shards.sources import SourceOptions
from shards.verify import verify
from tests.helpers.face_folders import write_faces

OPTIONS = PackOptions(samples_per_shard=4)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    return write_faces(tmp_path / "faces", {"ada": 5, "bob": 1, "cleo": 4})


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(directory.iterdir())}


def zip_of(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.jpg"):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def test_bytes_do_not_depend_on_workers_or_layout(faces: Path, tmp_path: Path) -> None:
    pack(faces, tmp_path / "one", OPTIONS)
    pack(faces, tmp_path / "two", OPTIONS, workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    archive = zip_of(faces, tmp_path / "faces.zip", prefix="some/folder/")
    pack(archive, tmp_path / "three", OPTIONS)
    tars = [{k: v for k, v in hashes(tmp_path / name).items() if k.endswith(".tar")} for name in ("one", "three")]
    assert tars[0] == tars[1]
    assert verify(tmp_path / "two").problems == []


def test_the_webdataset_library_reads_the_shards(faces: Path, tmp_path: Path) -> None:
    manifest = pack(faces, tmp_path / "out", OPTIONS)
    names = [identity.name for identity in read_identities(tmp_path / "out")]
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == manifest.num_samples == 10
    for sample in samples:
        identity, _ = sample["__key__"].split("/")
        assert names[int(sample["cls"])] == identity
        assert sample["jpg"] == (faces / f"{sample['__key__']}.jpg").read_bytes()


def test_an_interrupted_packing_continues(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = PackWorker.write
    written: list[int] = []

    def stop_at_the_third(worker: PackWorker, shard: int) -> object:
        if shard == 2 and not resumed:
            raise KeyboardInterrupt
        written.append(shard)
        return write(worker, shard)

    resumed = False
    monkeypatch.setattr(PackWorker, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(faces, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(DataError, match="another source or with other options"):
        pack(faces, tmp_path / "out", PackOptions(samples_per_shard=3))
    resumed = True
    (tmp_path / "out" / ".shard-000002.tar.x.tmp").touch()
    pack(faces, tmp_path / "out", OPTIONS)
    assert written == [0, 1, 2]
    pack(faces, tmp_path / "fresh", OPTIONS)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_outputs_of_others_are_refused(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(faces, out, OPTIONS)
    with pytest.raises(DataError, match="already holds finished shards"):
        pack(faces, out, OPTIONS)
    with pytest.raises(DataError, match=r"exists and holds 'ada'.*Name another directory"):
        pack(faces, faces, OPTIONS)
    work = tmp_path / "busy" / ".packing"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another process is packing"):
            pack(faces, tmp_path / "busy", OPTIONS)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "nowhere does not exist"),
        ("damaged.zip", {}, "damaged.zip"),
        ("faces", {"min_images": 6}, "Lower --min-images"),
        ("faces", {"identities": ("zoe",)}, "names 'zoe'"),
    ],
)
def test_a_packing_that_cannot_begin_leaves_nothing(
    faces: Path, tmp_path: Path, source: str, options: dict, message: str
) -> None:
    (faces.parent / "damaged.zip").write_bytes(b"PK\x03\x04 and no more")
    out = tmp_path / "new" / "deep" / "out"
    with pytest.raises(DataError, match=message):
        pack(faces.parent / source, out, PackOptions(**options))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        pack(faces.parent / source, tmp_path / "empty", PackOptions(**options))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_refused_packing_leaves_the_unfinished_one_of_another(faces: Path, tmp_path: Path) -> None:
    (faces / "ada" / "bad.jpg").write_bytes(b"\xff\xd8\xffnothing")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 unreadable image"):
        pack(faces, out, OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(DataError, match="does not exist"):
        pack(tmp_path / "nowhere", out, OPTIONS)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"} == before
    assert pack(faces, out, PackOptions(samples_per_shard=4, max_bad=1)).num_samples == 10


def test_unreadable_images_are_named_or_skipped(faces: Path, tmp_path: Path) -> None:
    (faces / "ada" / "bad.jpg").write_bytes(b"\xff\xd8\xffnothing")
    with pytest.raises(DataError, match=r"(?s)1 unreadable image.*--max-bad 0 allows.*ada/bad.jpg"):
        pack(faces, tmp_path / "out", OPTIONS)
    manifest = pack(faces, tmp_path / "out", PackOptions(samples_per_shard=4, max_bad=1))
    assert (manifest.num_samples, manifest.skipped) == (10, 1)
    assert verify(tmp_path / "out").problems == []


def test_a_wrong_crc_counts_as_unreadable(faces: Path, tmp_path: Path) -> None:
    archive = zip_of(faces, tmp_path / "faces.zip")
    content = bytearray(archive.read_bytes())
    start = content.index(b"bob/000.jpg") + len("bob/000.jpg")
    content[start + 40] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"bob/000.jpg cannot be read: Bad CRC"):
        pack(archive, tmp_path / "out", OPTIONS)


def test_identities_can_be_chosen(faces: Path, tmp_path: Path) -> None:
    manifest = pack(faces, tmp_path / "few", PackOptions(min_images=2))
    assert (manifest.num_classes, manifest.num_samples) == (2, 9)
    assert pack(faces, tmp_path / "bob", PackOptions(identities=("bob",))).num_samples == 1
    with pytest.raises(DataError, match="names 'zoe'"):
        pack(faces, tmp_path / "zoe", PackOptions(identities=("zoe",)))
    with pytest.raises(DataError, match=r"largest has 5\. Lower --min-images"):
        pack(faces, tmp_path / "none", PackOptions(min_images=6))


def test_equal_sample_keys_are_refused(faces: Path, tmp_path: Path) -> None:
    (faces / "ada" / "000.png").write_bytes((faces / "ada" / "000.jpg").read_bytes())
    with pytest.raises(DataError, match="would have the same sample key"):
        pack(faces, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], "holds no images"),
        (["a/../../b/1.jpg"], "leads out of the collection"),
        (["1.jpg"], "lies in no identity folder"),
        (["x/ada/1.jpg", "y/ada/1.jpg"], "would be one identity, 'ada'"),
        (["ada/1.jpg", "ada/1.jpg"], "would both be image"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unusable_zips_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "faces.zip", tmp_path / "out", OPTIONS)


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        pack(tmp_path / "absent", tmp_path / "out", OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        pack(tmp_path / "empty", tmp_path / "out", OPTIONS)
    (tmp_path / "file.xyz").touch()
    with pytest.raises(DataError, match=r"(?s)name it by --format:.*recordio"):
        pack(tmp_path / "file.xyz", tmp_path / "out", OPTIONS)
    with pytest.raises(DataError, match="choose from folder, zip"):
        pack(tmp_path / "empty", tmp_path / "out", PackOptions(source=SourceOptions("lmdb")))


def test_face_sets_are_equal_whatever_holds_them(faces: Path, tmp_path: Path) -> None:
    pack(faces, tmp_path / "out", OPTIONS)
    sets = [open_face_set(faces), open_face_set(zip_of(faces, tmp_path / "f.zip")), open_face_set(tmp_path / "out")]
    for other in sets[1:]:
        assert list(other.keys) == list(sets[0].keys)
        assert list(other.identities) == list(sets[0].identities)
        assert all((other.read(i) == sets[0].read(i)).all() for i in range(10))


def test_verify_names_shard_and_key(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(faces, out, OPTIONS)
    tar = out / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[600:700] = bytes(100)
    tar.write_bytes(content)
    problems = "\n".join(verify(out).problems)
    assert "shard-000001.tar: its SHA-256 differs" in problems
    assert "not a readable JPEG" in problems
    tar.write_bytes(content[:3000])
    assert any("whole samples, the manifest says 4" in problem for problem in verify(out).problems)
