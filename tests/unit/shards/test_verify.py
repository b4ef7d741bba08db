"""Every damage is found and named; none makes the check stop or crash; the repaired copy is without fault."""

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from aroface.errors import DataError
from aroface.images import encode_jpeg
from shards.dataset import ShardDataset
from shards.manifest import read_identities, read_manifest
from shards.pack import PackOptions, pack
from shards.repair import repair
from shards.verify import verify
from tests.helpers.face_folders import write_faces

IMAGES_OF = {"ada": 5, "bob": 1, "cleo": 7, "dan": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    pack(write_faces(root / "faces", IMAGES_OF), root / "shards", PackOptions(samples_per_shard=6))
    return root / "shards"


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def label_place(shards: Path, name: str = "shard-000001.tar") -> int:
    """Offset of the first label text of a shard."""
    content = (shards / name).read_bytes()
    return content.index(b".cls\0") // 512 * 512 + 512


def images_by_key(shards: Path) -> dict[str, tuple[bytes, str]]:
    names = [identity.name for identity in read_identities(shards)]
    data = ShardDataset(shards, image_size=16)
    found = {}
    for sample in range(data.num_samples):
        content, label = data.read(sample)
        found[data.member_name(sample)] = (bytes(content), names[label])
    return found


DAMAGES: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("missing", lambda d: (d / "shard-000001.tar").unlink(), "missing", r"shard-000001.tar: missing"),
    ("cut", lambda d: cut(d / "shard-000001.tar", 3000), "tar", r"shard-000001.tar.*cut short"),
    ("byte of an image", lambda d: flip(d / "shard-000001.tar", 600), "hash", "its SHA-256 differs"),
    ("header of an image", lambda d: flip(d / "shard-000001.tar", 512), "image", r"shard-000001.tar: .*\.jpg: not a"),
    ("tar header", lambda d: flip(d / "shard-000001.tar", 3), "tar", "no tar header after the beginning"),
    ("label", lambda d: flip(d / "shard-000001.tar", label_place(d)), "label", r"\.cls: label .* is outside \[0, 4\)"),
    ("no index", lambda d: (d / "shard-000000.idx").unlink(), "index", "shard-000000.idx is missing"),
    (
        "index of another",
        lambda d: shutil.copy(d / "shard-000000.idx", d / "shard-000001.idx"),
        "index",
        "shard-000001.idx belongs to another tar",
    ),
    ("index cut", lambda d: cut(d / "shard-000000.idx", 100), "index", "shard-000000.idx is 100 bytes long"),
    (
        "index entry",
        lambda d: flip(d / "shard-000000.idx", 64),
        "index",
        r"offset, length, label are .* the index says",
    ),
    ("identities", lambda d: cut(d / "identities.csv", 40), "identities", "identities"),
    ("classes", lambda d: edit(d / "manifest.json", num_classes=3), "label", r"is outside \[0, 3\)"),
    (
        "size",
        lambda d: edit(d / "manifest.json", image_size=[9, 9]),
        "image",
        "16 x 16 pixels, the manifest says 9 x 9",
    ),
    ("count", lambda d: edit(d / "manifest.json", num_samples=9), "count", "9 samples, but its shards add up to 15"),
]


@pytest.mark.parametrize(("damage", "kind", "text"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_damages_are_named_and_repaired(shards: Path, tmp_path: Path, damage, kind: str, text: str) -> None:
    before = images_by_key(shards)
    damage(shards)
    found = verify(shards, workers=2)
    matching = [fault for fault in found.faults if fault.kind == kind]
    assert matching
    assert any(re.search(text, fault.text) for fault in matching)
    result = repair(shards, tmp_path / "clean")
    assert verify(tmp_path / "clean").problems == []
    after = images_by_key(tmp_path / "clean")
    if kind != "label":  # names come from the index of a class
        for key, (content, identity) in after.items():
            assert identity == before[key][1]
            assert content == before[key][0] or kind in ("hash", "image")
    lost = set(before) - set(after)
    listed = {row[1] for row in result.dropped if row[1]}
    whole_places = sum(not row[1] for row in result.dropped)
    assert lost == listed or whole_places
    assert result.manifest.num_samples == len(after)
    assert result.lost == result.manifest.skipped == len(lost)


def test_a_sound_set_has_no_fault_and_a_copy_equals_it(packed: Path, tmp_path: Path) -> None:
    found = verify(packed, workers=3)
    assert (found.faults, found.notes, found.samples) == ([], [], 15)
    result = repair(packed, tmp_path / "copy")
    assert result.dropped == []
    for path in packed.glob("shard-*"):
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(DataError, match="exists already and is not empty"):
        repair(packed, tmp_path / "copy")


@pytest.mark.parametrize("name", ["manifest.json", "identities.csv", "shard-000000.idx", None])
def test_a_set_without_its_lists_is_saved(shards: Path, tmp_path: Path, name: str | None) -> None:
    before = images_by_key(shards)
    for path in shards.iterdir():
        if path.suffix != ".tar" and name in (None, path.name):
            path.unlink()
    repair(shards, tmp_path / "clean")
    assert verify(tmp_path / "clean").problems == []
    after = images_by_key(tmp_path / "clean")
    assert after == before


def test_classes_without_images_are_renumbered_with_a_map(shards: Path, tmp_path: Path) -> None:
    before = images_by_key(shards)
    data = ShardDataset(shards, image_size=16)
    [bob] = [s for s in range(15) if data.member_name(s).startswith("bob/")]
    shard, row = data._locate(bob)
    flip(shards / f"shard-{shard:06d}.tar", int(data._indices[shard].offset[row]))
    result = repair(shards, tmp_path / "clean")
    assert result.renumbered == 2
    assert [(i.name, i.images) for i in read_identities(tmp_path / "clean")] == [("ada", 5), ("cleo", 7), ("dan", 2)]
    with (tmp_path / "clean" / "identity_map.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == [["0", "0", "ada"], ["1", "2", "cleo"], ["2", "3", "dan"]]
    with (tmp_path / "clean" / "dropped.csv").open(newline="") as file:
        [(name, key, reason)] = list(csv.reader(file))[1:]
    assert (name, key) == (f"shard-{shard:06d}.tar", "bob/000.jpg")
    assert "not an image" in reason or "JPEG" in reason
    assert images_by_key(tmp_path / "clean") == {k: v for k, v in before.items() if k != "bob/000.jpg"}


@pytest.mark.parametrize("without", [None, "manifest.json", "shard-000001.idx"])
def test_what_a_cut_takes_away_is_counted(shards: Path, tmp_path: Path, without: str | None) -> None:
    before = images_by_key(shards)
    dataset = ShardDataset(shards, image_size=16)
    gone = [before[dataset.member_name(6 + row)][1] for row in range(2, 6)]
    cut(shards / "shard-000001.tar", int(dataset._indices[1].offset[2]))
    if without:
        (shards / without).unlink()
    result = repair(shards, tmp_path / "clean")
    assert (result.lost, result.manifest.num_samples, result.manifest.skipped) == (4, 11, 4)
    assert result.is_counted == (without != "manifest.json")
    listed = [reason for shard, _, reason in result.dropped if " gone" in reason and shard == "shard-000001.tar"]
    one_by_one = [f"image {row} of 6 is gone; it was of {name}" for row, name in enumerate(gone, 3)]
    assert listed == (["4 of 6 images are gone"] if without == "shard-000001.idx" else one_by_one)


def test_nothing_to_save_is_told(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no shard"):
        repair(tmp_path / "empty", tmp_path / "out")
    for path in shards.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="not one sample could be saved"):
        repair(shards, tmp_path / "out")


def test_unusual_colours_and_unknown_files_are_noted(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", {"ada": 1})
    pixels = np.full((16, 16, 4), 90, np.uint8)
    for name, image in (("grey.png", pixels[..., 0]), ("alpha.png", pixels)):
        (faces / "ada" / name).write_bytes(cv2.imencode(".png", image)[1].tobytes())
    import simplejpeg

    grey = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., :1]), colorspace="GRAY", colorsubsampling="Gray")
    (faces / "ada" / "gray.jpg").write_bytes(grey)
    pack(faces, tmp_path / "out", PackOptions())
    (tmp_path / "out" / "notes.txt").touch()
    found = verify(tmp_path / "out")
    assert found.faults == []
    assert sorted((note.key, note.text.split(": ")[-1]) for note in found.notes) == [
        ("ada/alpha.png", "a PNG with alpha; it is read as RGB."),
        ("ada/gray.jpg", "a grey JPEG; it is read as RGB."),
        ("ada/grey.png", "a grey PNG; it is read as RGB."),
        ("notes.txt", "the manifest does not know it; it is never read."),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_never_stops_the_check_and_can_be_repaired(shards: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    original = {path.name: path.read_bytes() for path in shards.iterdir()}
    for _ in range(chance.randint(1, 3)):
        path = shards / chance.choice(sorted(original))
        content = path.read_bytes()
        if not content:
            continue
        if chance.random() < 0.3:
            cut(path, chance.randrange(len(content)))
        else:
            flip(path, chance.randrange(len(content)))
    changed = any((shards / name).read_bytes() != content for name, content in original.items())
    try:
        found: list[object] = list(verify(shards).faults)
    except DataError as error:
        assert "manifest.json" in str(error)  # noqa: PT017 - one of several outcomes
        found = [error]
    harmless = [n for n in original if (shards / n).read_bytes() != original[n]] == ["manifest.json"]
    assert bool(found) == changed or harmless
    try:
        repair(shards, tmp_path / "clean")
    except DataError as error:
        assert "not one sample could be saved" in str(error)  # noqa: PT017 - one of several outcomes
    else:
        assert verify(tmp_path / "clean").problems == []
        assert read_manifest(tmp_path / "clean").num_samples > 0


def test_labels_that_two_places_tell_differently_are_dropped(shards: Path, tmp_path: Path) -> None:
    place = label_place(shards)
    tar = shards / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[place] = ord("0") if content[place] != ord("0") else ord("1")
    tar.write_bytes(content)
    result = repair(shards, tmp_path / "clean")
    [(_, _, reason)] = result.dropped
    assert "in the tar" in reason and "in the index" in reason  # noqa: PT018 - one sentence


def test_a_summary_is_one_page_with_its_numbers(tmp_path: Path) -> None:
    from shards.summary import summarise, write_summary

    faces = write_faces(tmp_path / "faces", {"ada": 9, "<b>ob": 2, "cleo": 1})
    (faces / "ada" / "large.jpg").write_bytes(encode_jpeg(np.zeros((20, 30, 3), np.uint8)))
    pack(faces, tmp_path / "out", PackOptions())
    found = summarise(tmp_path / "out")
    assert found.identities_by_images == [(1, 1, 1), (2, 3, 1), (4, 7, 0), (8, 15, 1)]
    assert found.images_per_identity["largest"] == 10
    assert found.image_sizes == [("16 x 16", 12), ("30 x 20", 1)]
    assert found.largest[0] == ("ada", 10)
    page = write_summary(tmp_path / "out").read_text()
    assert page.count("<figure>") == 13
    assert "&lt;b&gt;ob" in page
    assert "<b>ob" not in page
    assert 'src="http' not in page
    assert "<script" not in page
    again = write_summary(tmp_path / "out", tmp_path / "elsewhere").read_text()
    assert again == page
    assert verify(tmp_path / "out").notes == []
