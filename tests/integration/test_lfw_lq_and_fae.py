"""LFW-LQ, FAE-1 and the gallery command from end to end: on drawn patterns, and on real faces where they lie."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from aroface.errors import DataError
from launch.cli import main
from retrieval.baselines import PixelEmbedder
from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet
from retrieval.metrics import evaluate_verification, search_gallery
from retrieval.protocols.fae import SWEEPS, FaeSettings, evaluate_fae
from retrieval.protocols.fae import num_forward_images as fae_images
from retrieval.protocols.lfw_lq import LfwLqSettings, evaluate_lfw_lq, num_forward_images
from retrieval.protocols.lfw_pairs import draw_pairs

REAL = Path(__file__).resolve().parents[3] / "shared" / "faces"


class Patterns:
    """Identities are blurred noise; their images differ by more noise. The last few have a single image."""

    def __init__(self, identities: int = 24, images: int = 3, singles: int = 6, side: int = 112) -> None:
        generator = np.random.default_rng(0)
        self.keys: list[str] = []
        self.identities: list[str] = []
        self._pixels: list[NDArray[np.uint8]] = []
        for person in range(identities):
            base = generator.normal(size=(side, side, 3))
            for image in range(1 if person >= identities - singles else images):
                field = cv2.GaussianBlur(base + generator.normal(size=base.shape), (0, 0), 4)
                field = 127 + 40 * field / field.std()
                self.keys.append(f"p{person:02d}/p{person:02d}_{image + 1:04d}.png")
                self.identities.append(f"p{person:02d}")
                self._pixels.append(field.clip(0, 255).astype(np.uint8))

    def read(self, index: int) -> NDArray[np.uint8]:
        return self._pixels[index]


FACES = Patterns()


def _lfw_lq(settings: LfwLqSettings) -> tuple[dict[str, Any], list[int]]:
    seen: list[int] = []
    pairs = draw_pairs(FACES.identities)
    return evaluate_lfw_lq(PixelEmbedder(), FACES, settings, pairs=pairs, on_progress=seen.append), seen


def test_lfw_lq_counts_conditions_and_progress() -> None:
    settings = LfwLqSettings(sizes_px=(40, 8))
    record, seen = _lfw_lq(settings)
    json.dumps(record, allow_nan=False)
    assert list(record["conditions"]) == ["clean", "40px", "8px", "verification"]
    for name in ("clean", "40px", "8px"):
        counts = record["conditions"][name]["counts"]
        assert (counts["probes"], counts["mated"], counts["non_mated"]) == (36, 36, 0)
        assert (counts["open_set_mated"], counts["open_set_non_mated"]) == (18, 18)
    assert record["counts"]["gallery"] == 24
    assert seen == sorted(seen)
    assert seen[-1] == num_forward_images(FACES, settings) == 24 + 3 * 36
    value = {name: record["metrics"][f"rank_1@{name}"]["value"] for name in ("clean", "40px", "8px")}
    assert value["clean"] > value["8px"]


def test_lfw_lq_clean_numbers_equal_the_metrics_on_plain_embeddings() -> None:
    record, _ = _lfw_lq(LfwLqSettings(sizes_px=(), flip="none"))
    everything = EmbeddingSet(
        PixelEmbedder().embed(np.stack([FACES.read(i) for i in range(len(FACES.keys))])), np.array(FACES.identities)
    )
    first = np.array([key.endswith("_0001.png") for key in FACES.keys])
    search = search_gallery(everything.take(first), everything.take(~first))
    assert record["metrics"]["rank_1@clean"]["value"] == pytest.approx((search.rank <= 1).mean())
    several = np.isin(everything.subject_ids, everything.subject_ids[~first])
    search = search_gallery(everything.take(first & several), everything.take(~first))
    assert record["metrics"]["rank_1_first_300"]["value"] == pytest.approx((search.rank <= 1).mean())
    pairs = evaluate_verification(everything, draw_pairs(FACES.identities), fars=[0.1])
    assert record["metrics"]["accuracy"]["value"] == pairs.accuracy
    assert record["metrics"]["tar@far=1e-1"]["value"] == pairs.points[0].tar


def test_lfw_lq_without_degradation_of_note_is_the_clean_task() -> None:
    record, _ = _lfw_lq(LfwLqSettings(sizes_px=(112,), severity=0.0))
    clean, same = (record["metrics"][f"rank_1@{name}"]["value"] for name in ("clean", "112px"))
    assert same == pytest.approx(clean, abs=0.03)  # JPEG is all that is left


def test_lfw_lq_is_repeatable() -> None:
    settings = LfwLqSettings(sizes_px=(14,))
    assert _lfw_lq(settings)[0] == _lfw_lq(settings)[0]


def test_fae_falls_from_the_clean_value_and_keeps_both_policies() -> None:
    seen: list[int] = []
    settings = FaeSettings(subset=20, trials=2, flip="none")
    record = evaluate_fae(PixelEmbedder(), FACES, settings, on_progress=seen.append)
    json.dumps(record, allow_nan=False)
    assert seen[-1] == fae_images(FACES, settings)
    assert record["counts"]["probes"] == 20
    assert [sweep["name"] for sweep in record["sweeps"]] == [sweep.name for sweep in SWEEPS]
    for sweep, definition in zip(record["sweeps"], SWEEPS, strict=True):
        points = {point["severity"]: point for point in sweep["points"]}
        clean = points[definition.clean_level]
        worst = points[definition.levels[-1]]
        assert clean["nme"] == 0.0
        assert clean["metrics"]["rank_1"] == record["metrics"]["rank_1"]["value"]
        assert clean["metrics"]["fnmr_frozen"] == pytest.approx(1 - clean["metrics"]["tar@far=1e-2"])
        assert worst["metrics"]["rank_1"] < clean["metrics"]["rank_1"]
        assert worst["metrics"]["fnmr_frozen"] > clean["metrics"]["fnmr_frozen"]
        assert (worst["sd"]["rank_1"] is None) == (not definition.is_random)
        area = record["metrics"][f"area_rank_1@{sweep['name']}"]["value"]
        values = [point["metrics"]["rank_1"] for point in sweep["points"]]
        steps = list(zip(definition.levels[:-1], definition.levels[1:], values[:-1], values[1:], strict=True))
        by_hand = sum((right - left) * (low + high) / 2 for left, right, low, high in steps)
        assert area == pytest.approx(by_hand / (definition.levels[-1] - definition.levels[0]))
    # A shift of 12 px moves every landmark by 12 px: the NME is that over the distance of the eyes.
    shift = record["sweeps"][1]["points"][-1]
    assert shift["nme"] == pytest.approx(12 / 35.23774, rel=1e-5)


def test_names_that_are_no_unicode_are_measured_like_others() -> None:
    faces = Patterns(identities=4, singles=0)
    faces.keys = [key.replace("p0", "\udcff") for key in faces.keys]  # what Python makes of the byte 0xff
    faces.identities = [name.replace("p0", "\udcff") for name in faces.identities]
    pairs, seen = draw_pairs(faces.identities), []
    settings = LfwLqSettings(sizes_px=(40,))
    degraded = evaluate_lfw_lq(PixelEmbedder(), faces, settings, pairs=pairs, on_progress=seen.append)
    assert degraded["conditions"]["40px"]["counts"]["probes"] == 8
    moved = evaluate_fae(PixelEmbedder(), faces, FaeSettings(subset=5, trials=1), on_progress=seen.append)
    assert moved["counts"]["probes"] == 5


def test_sets_that_cannot_be_searched_are_explained() -> None:
    settings = LfwLqSettings()
    with pytest.raises(DataError, match="has two images: nobody is left to search for"):
        num_forward_images(Patterns(identities=3, singles=3), settings)
    with pytest.raises(DataError, match="has 1 identity; identification needs two"):
        num_forward_images(Patterns(identities=1, singles=0), settings)


def test_faces_that_are_not_square_are_named() -> None:
    class Wide(Patterns):
        def read(self, index: int) -> NDArray[np.uint8]:
            return super().read(index)[:80]

    faces = Wide()
    with pytest.raises(DataError, match=r"p00/p00_0002\.png is 112 x 80 pixels; aligned faces are square"):
        evaluate_lfw_lq(
            PixelEmbedder(), faces, LfwLqSettings(), pairs=draw_pairs(faces.identities), on_progress=lambda _: None
        )


@pytest.mark.skipif(not REAL.is_dir(), reason="the real faces are not on this machine")
def test_commands_on_real_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("launch.embedders.open_embedder", lambda *_, **__: PixelEmbedder())
    from shards.faces import open_face_set

    whole = open_face_set(REAL / "test.zip")
    people = [name for name in dict.fromkeys(whole.identities) if whole.identities.count(name) >= 2][:12]
    for key, name, index in zip(whole.keys, whole.identities, range(len(whole.keys)), strict=True):
        if name in people:
            target = tmp_path / "faces" / name / Path(key).with_suffix(".png").name
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), whole.read(index)[..., ::-1])
    faces = str(tmp_path / "faces")
    out = tmp_path / "r.json"
    assert main(["evaluate", "lfw-lq", "--model", "m", "--faces", faces, "--sizes", "28", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["protocol"] == "lfw-lq"
    assert list(record["baselines"]) == ["pixels"]
    assert record["baselines"]["pixels"]["metrics"] == record["metrics"]
    assert "rank_1@28px" in capsys.readouterr().out
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("Nobody\t1\t2\n")
    command = ["evaluate", "lfw-lq", "--model", "m", "--faces", faces, "--pairs", str(pairs), "--out", str(out)]
    assert main(command) == 2
    assert "line 1: the set has 0 images number 1 of Nobody" in capsys.readouterr().err
    assert main(["evaluate", "fae", "--model", "m", "--faces", faces, "--subset", "8", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["counts"]["probes"] == 8


def test_the_gallery_command(tmp_path: Path, capsys: Any) -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    names = np.array(list("aabbcc"))
    keys = np.array([f"{name}/{i}.jpg" for i, name in enumerate(names)])
    failed = np.array([False] * 5 + [True])

    def write(name: str, rows: slice, model: str) -> str:
        path = tmp_path / name
        metadata = {"model_id": model, "contract": {"image_size": 112, "colour_order": "rgb"}}
        found = EmbeddingSet(vectors, names, keys=keys, fte=failed, metadata=metadata)
        write_embeddings(path, found.take(np.arange(6)[rows]))
        return str(path)

    enrolled, more = write("e.npz", slice(0, 4), "m1"), write("p.npz", slice(4, 6), "m1")
    gallery, out = str(tmp_path / "g"), tmp_path / "c.json"
    assert main(["gallery", "build", gallery, "--embeddings", enrolled]) == 0
    assert "4 entries of 2 subjects, D = 8" in capsys.readouterr().out
    assert main(["gallery", "add", gallery, "--embeddings", more]) == 0
    assert "5 entries of 3 subjects" in capsys.readouterr().out  # the row that failed to enrol is left out
    command = ["gallery", "search", gallery, "--probes", enrolled, "--top", "2", "--level", "subject"]
    assert main([*command, "--out", str(out)]) == 0
    searches = json.loads(out.read_text())["searches"]
    assert [search["probe"] for search in searches] == keys[:4].tolist()
    for search in searches:
        best = search["candidates"][0]
        assert (best["entry_id"], best["subject_id"], best["rank"]) == (search["probe"], search["subject_id"], 1)
        assert best["score"] == pytest.approx(1)
    assert main(["gallery", "remove", gallery, "--subject", "a", "--entry", "b/2.jpg"]) == 0
    assert main(["gallery", "info", gallery, "--entries"]) == 0
    text = capsys.readouterr().out
    assert "2 entries of 2 subjects" in text
    assert "b/3.jpg\tb\t" in text

    other = write("o.npz", slice(0, 1), "m2")
    for command, message in [
        (["search", gallery, "--probes", other], "model m1; these are of m2"),
        (["build", gallery, "--embeddings", enrolled], "exists already"),
        (["remove", gallery], "name entries with --entry"),
        (["remove", gallery, "--subject", "zz"], "has no subject zz"),
        (["info", str(tmp_path / "none")], "make one with `aroface gallery build`"),
        (["build", str(tmp_path / "n"), "--embeddings", write("f.npz", slice(5, 6), "m1")], "every row failed"),
    ]:
        assert main(["gallery", *command]) == 2
        assert message in capsys.readouterr().err
    assert main(["gallery", "build", gallery, "--embeddings", other, "--replace"]) == 0


def test_fae_misaligns_the_gallery_too_where_it_is_asked_to() -> None:
    seen: list[int] = []
    settings = FaeSettings(subset=6, sides="both", flip="none")
    both = evaluate_fae(PixelEmbedder(), FACES, settings, on_progress=seen.append)
    assert seen[-1] == fae_images(FACES, settings)
    probe = evaluate_fae(PixelEmbedder(), FACES, FaeSettings(subset=6, flip="none"), on_progress=seen.append)
    clean = [record["sweeps"][0]["points"][5]["metrics"] for record in (both, probe)]
    assert clean[0] == clean[1]
    turned = [record["sweeps"][0]["points"][-1] for record in (both, probe)]  # by one angle on both sides
    assert turned[0]["metrics"]["rank_1"] >= turned[1]["metrics"]["rank_1"]
    assert both["settings"]["sides"] == "both"
