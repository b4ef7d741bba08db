"""FAE-1 on every kind of set, from the files of its protocol, and the one warp that it promises."""

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from aroface.align import align_face
from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ConfigError
from aroface.images import encode_jpeg
from launch.cli import main
from retrieval.baselines import PixelEmbedder
from retrieval.degrade import ALIGNED, Misalignment, nme
from retrieval.protocols import fae
from retrieval.protocols.fae_sets import of_faces
from retrieval.protocols.fae_sweeps import SWEEPS, WarpedFaces, drawn_error, points_in_crop
from tests.helpers.protocol_sets import write_ijb, write_ijbs, write_survface, write_tinyface
from tests.numerics.test_protocol_vectors import VECTORS

TURNED = Misalignment(10.0, 1.1, (4.0, -2.0))


class OneImage:
    keys, identities = ("a/1.png",), ("a",)

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def read(self, index: int) -> np.ndarray:
        return self._pixels


def source_landmarks() -> np.ndarray:
    """Landmarks in a photograph of 300 x 260 pixels: the template turned, enlarged and moved."""
    angle, scale = np.deg2rad(-23), 1.7
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (np.asarray(ARCFACE_TEMPLATE_112) - 56) @ turn.T + [150, 130]


def test_tv11_the_landmarks_of_the_source_go_where_the_vector_says_in_one_warp() -> None:
    points = source_landmarks()
    moved = VECTORS["TV11"]["points"]
    for place, (x, y) in enumerate(points):
        photo = np.zeros((260, 300, 3), np.uint8)
        cv2.circle(photo, (round(x * 16), round(y * 16)), 80, (255,) * 3, -1, cv2.LINE_AA, 4)
        faces = WarpedFaces(OneImage(photo), ["a/1.png"], [0], points.reshape(1, 10).astype(np.float32), [TURNED])
        weights = faces.read(0)[..., 0].astype(float)
        rows, columns = np.indices(weights.shape)
        found = [(columns * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()]
        np.testing.assert_allclose(found, moved[place], atol=0.2)


def test_one_warp_keeps_what_two_would_blur() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (260, 300, 3), np.uint8)
    landmarks = source_landmarks().reshape(1, 10).astype(np.float32)
    read = {}
    for error in (ALIGNED, TURNED):
        read[error] = WarpedFaces(OneImage(photo), ["a"], [0], landmarks, [error]).read(0)
    np.testing.assert_array_equal(read[ALIGNED], align_face(photo, landmarks[0]))
    twice = cv2.warpAffine(read[ALIGNED], TURNED.matrix(), (112, 112))
    inner = np.s_[25:-25, 25:-25]
    assert read[TURNED][inner].std() > 1.1 * twice[inner].std()  # a second interpolation smooths


def test_the_error_is_realised_and_belongs_to_set_key_trial_and_side() -> None:
    points = points_in_crop(None)
    sweep = {sweep.name: sweep for sweep in SWEEPS}

    def draw(**change: Any) -> Misalignment:
        settings = {"data_set": "s", "key": "k", "trial": 0, "points": points, **change}
        return drawn_error(sweep["shift"], 6, **settings)

    assert draw() == draw()
    assert len({draw(), draw(data_set="t"), draw(key="l"), draw(trial=1), draw(side="reference")}) == 5
    assert nme(draw(), points) == pytest.approx(6 / 35.23774, rel=1e-5)
    angles = {
        drawn_error(sweep["angle"], 10, data_set="s", key=str(i), trial=0, side="reference", points=points).theta_deg
        for i in range(50)
    }
    assert angles == {-10, 10}
    scales = {
        drawn_error(sweep["scale"], 1.2, data_set="s", key=str(i), trial=0, side="reference", points=points).scale
        for i in range(50)
    }
    assert {round(scale, 9) for scale in scales} == {0.8, 1.2}


def test_crops_that_are_not_square_are_refused_and_not_counted_as_failures() -> None:
    faces = WarpedFaces(OneImage(np.zeros((80, 112, 3), np.uint8)), ["a/1.png"], [0], None, [ALIGNED])
    with pytest.raises(ConfigError, match="a/1.png is 112 x 80 pixels; aligned faces are square"):
        faces.read(0)


def draw(person: int, image: int) -> np.ndarray:
    base = np.random.default_rng(person).normal(size=(112, 112, 3))
    field = cv2.GaussianBlur(base + 0.5 * np.random.default_rng([person, image]).normal(size=base.shape), (0, 0), 5)
    return (127 + 40 * field / field.std()).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, keys: list[str], people: list[int]) -> None:
    for number, (key, person) in enumerate(zip(keys, people, strict=True)):
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(draw(person, number), quality=90))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps of three levels, and pixels for a model."""
    angle, shift = (next(sweep for sweep in SWEEPS if sweep.name == name) for name in ("angle", "shift"))
    from dataclasses import replace

    chosen = (replace(angle, levels=(-20, 0, 20)), replace(shift, levels=(0, 4, 12)))
    monkeypatch.setattr(fae, "SWEEPS", chosen)
    monkeypatch.setattr("launch.embedders.open_embedder", lambda *_, **__: PixelEmbedder())


def run(tmp_path: Path, *options: object) -> dict[str, Any]:
    out = tmp_path / "fae.json"
    assert main(["evaluate", "fae", "--model", "m", "--far", "0.1", *map(str, options), "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    is_aligned_here = bool(record["model"].get("aligned_by"))
    assert is_aligned_here == ("ijbc" in options)  # the only set here whose lists hold landmarks
    expected = "arcface_112" if is_aligned_here else "unknown (model expects arcface_112)"
    assert record["preprocessing"]["alignment"] == expected
    assert record["protocol_version"] == record["settings"]["version"] == 2
    assert record["inputs"]["files"]
    for sweep in record["sweeps"]:
        clean = next(p for p in sweep["points"] if p["nme"] == 0)
        worst = sweep["points"][-1]
        assert set(clean["difference"].values()) == {0}
        assert worst["nme"] > 0.2
        # With black corners on both sides pixels of strangers match too: it is the frozen threshold that tells.
        assert max(worst["difference"]["fnmr_frozen"], worst["difference"]["fmr_frozen"]) > 0.2
        assert worst["metrics"]["tar@far=0.1"] < clean["metrics"]["tar@far=0.1"]
    return record


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("form", ["bin", "list"])
def test_pairs(tmp_path: Path, form: str) -> None:
    keys = [f"p{person}/p{person}_{i:04d}.jpg" for person in range(30) for i in (1, 2)]
    lines, images, same = [], [], []
    for fold in range(10):
        for person in range(3 * fold, 3 * fold + 3):
            for other in (person, (person + 1) % 30):
                lines.append(f"p{person}\t1\t2" if other == person else f"p{person}\t1\tp{other}\t2")
                images += [encode_jpeg(draw(person, 1)), encode_jpeg(draw(other, 2))]
                same.append(other == person)
    if form == "bin":
        (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same)))
        record = run(tmp_path, "--on", "lfw", "--lists", tmp_path / "lfw.bin")
    else:
        write_images(tmp_path / "faces", keys, [row // 2 for row in range(60)])
        (tmp_path / "pairs.txt").write_text("\n".join(lines))
        record = run(tmp_path, "--on", "lfw", "--lists", tmp_path / "pairs.txt", "--faces", tmp_path / "faces")
    assert (record["counts"]["genuine"], record["counts"]["impostor"]) == (30, 30)
    assert "rank_1" not in record["metrics"]
    assert record["set"] == "lfw"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("sides", ["probe", "both"])
def test_tinyface(tmp_path: Path, sides: str) -> None:
    keys, people = write_tinyface(tmp_path / "lists")
    write_images(tmp_path / "faces", keys, people)
    record = run(
        tmp_path, "--on", "tinyface", "--lists", tmp_path / "lists", "--faces", tmp_path / "faces", "--sides", sides
    )
    assert (record["counts"]["probes"], record["counts"]["gallery"]) == (12, 32)
    assert record["metrics"]["rank_1"]["value"] == 1
    assert "tpir@fpir=0.1" not in record["metrics"]  # every probe has a mate
    assert record["settings"]["sides"] == sides


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("task", ["1:1", "1:N"])
def test_ijbc_from_loose_crops(tmp_path: Path, task: str) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    write_images(tmp_path / "faces", keys, people)
    record = run(tmp_path, "--on", "ijbc", "--task", task, "--lists", tmp_path / "meta", "--faces", tmp_path / "faces")
    assert record["pooling"] == "N1D1"
    assert record["counts"]["probes"] == 16
    if task == "1:N":  # each gallery lacks half of the probes' people
        assert record["metrics"]["tpir@fpir=0.1"]["value"] == 1
        worst = record["sweeps"][0]["points"][-1]["metrics"]
        assert worst["fnir_frozen"] > 0
        assert 0 <= worst["fpir_frozen"] <= 1
    else:
        assert (record["counts"]["genuine"], record["counts"]["impostor"]) == (16, 112)


def test_a_list_of_pairs_has_no_fpir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    write_images(tmp_path / "faces", keys, people)
    source = ["--on", "ijbc", "--lists", tmp_path / "meta", "--faces", tmp_path / "faces", "--out", tmp_path / "r.json"]
    assert main(list(map(str, ["evaluate", "fae", "--model", "m", *source, "--fpir", "0.1"]))) == 2
    assert "--fpir 0.1 belongs to sets that are searched (1:N), and ijbc-11 is a list" in capsys.readouterr().err


@pytest.mark.usefixtures("short")
def test_the_template_is_recorded_only_where_landmarks_aligned_the_images_here(tmp_path: Path) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    write_images(tmp_path / "ijbc", keys, people)
    aligned = ["ijbc", "--meta", tmp_path / "meta", "--images", tmp_path / "ijbc"]
    keys, people = write_tinyface(tmp_path / "lists")
    write_images(tmp_path / "tinyface", keys, people)
    foreign = ["tinyface", "--lists", tmp_path / "lists", "--images", tmp_path / "tinyface"]
    for options, expected in (
        (aligned, "arcface_112"),
        (foreign, "unknown (model expects arcface_112)"),
        ([*foreign, "--alignment", "pad_0.1"], "pad_0.1"),
    ):
        command = ["evaluate", *options, "--model", "m", "--resamples", 0, "--out", tmp_path / "r.json"]
        assert main(list(map(str, command))) == 0
        assert json.loads((tmp_path / "r.json").read_text())["preprocessing"]["alignment"] == expected


@pytest.mark.usefixtures("short")
def test_ijbs_survface_scface_and_templates(tmp_path: Path) -> None:
    keys, people = write_ijbs(tmp_path / "cs6")
    write_images(tmp_path / "ijbs", keys, people)
    options = ["--lists", tmp_path / "cs6", "--faces", tmp_path / "ijbs", "--task", "surveillance_to_booking"]
    record = run(tmp_path, "--on", "ijbs", *options)
    assert (record["set"], record["counts"]["fte_probes"]) == ("ijbs-surveillance_to_booking", 1)
    keys, people = write_survface(tmp_path / "survface")
    write_images(tmp_path / "s", keys, people)
    record = run(tmp_path, "--on", "survface", "--lists", tmp_path / "survface", "--faces", tmp_path / "s")
    assert "tpir@fpir=0.1" in record["metrics"]
    keys = [f"{s:03d}_frontal.jpg" for s in range(1, 5)] + [
        f"{s:03d}_cam1_{d}.jpg" for s in range(1, 5) for d in (1, 2)
    ]
    write_images(tmp_path / "sc", keys, [int(key[:3]) for key in keys])
    out = tmp_path / "sc.json"
    command = ["evaluate", "fae", "--model", "m", "--on", "scface", "--faces", str(tmp_path / "sc"), "--out", str(out)]
    assert main(command) == 0
    assert json.loads(out.read_text())["counts"]["probes"] == 8
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        f"t{p}{r},{p},{role},{'G' if r == 0 else ''}" for p in range(8) for r, role in enumerate(("gallery", "probe"))
    ]
    (folder / "templates.csv").write_text("template_id,subject_id,role,gallery_name\n" + "\n".join(rows))
    keys = [f"{p}/{r}{i}.jpg" for p in range(8) for r in range(2) for i in range(2)]
    listed = [f"t{key[0]}{key[2]},m{key[3]},{key}" for key in keys]
    (folder / "samples.csv").write_text("template_id,media_id,path\n" + "\n".join(listed))
    write_images(tmp_path / "t", keys, [int(key[0]) for key in keys])
    record = run(tmp_path, "--on", "templates", "--lists", folder, "--faces", tmp_path / "t")
    assert (record["set"], record["pooling"]) == ("set", "N1D0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "tinyface", "--faces", "f"], "--on tinyface needs --lists"),
        (["--on", "lfw", "--lists", "pairs.txt"], "--on lfw needs --faces"),
        (["--faces", "f", "--task", "1:N"], "--task 1:N does not go with --on faces; its tasks: none"),
        (["--on", "ijbc", "--task", "uav_to_booking", "--lists", "l", "--faces", "f"], "its tasks: 1:1, 1:N"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["evaluate", "fae", "--model", "m", *options, "--out", str(tmp_path / "r.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_subset_is_the_same_for_every_model_and_keeps_only_the_pairs_of_its_probes() -> None:
    from retrieval.protocols.fae_sets import of_pairs

    keys = [f"{i}.jpg" for i in range(20)]
    pairs = np.arange(10), np.arange(10, 20), np.arange(10) < 5
    whole = of_pairs("s", keys, keys, pairs, files=[])
    part = whole.with_probes(4)
    assert len(part.probes.template_ids) == len(part.references.template_ids) == 4
    first, second, same = part.pairs
    left, right = part.references.keys[first], part.probes.keys[second]
    assert [int(a[:-4]) + 10 for a in left] == [int(b[:-4]) for b in right]
    assert same.tolist() == [int(a[:-4]) < 5 for a in left]
    assert whole.with_probes(4).probes.keys.tolist() == part.probes.keys.tolist()
    assert whole.with_probes(None) is whole
    assert of_faces(OneIdentityTwice()).probes.keys.tolist() == ["a/2.png"]


class OneIdentityTwice:
    keys, identities = ("a/1.png", "a/2.png", "b/1.png"), ("a", "a", "b")

    def read(self, index: int) -> np.ndarray:
        raise AssertionError("nothing is read")
