"""What a task does not use is refused, and what an embedding file holds is used and named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from launch.cli import main
from retrieval.embedding_files import read_embeddings, write_embeddings
from tests.helpers.protocol_sets import (
    SAMPLES,
    TEMPLATES,
    cells,
    embeddings_of,
    write_covariates,
    write_ijb,
    write_ijbs,
    write_keyed,
    write_manifest,
    write_survface,
)
from tests.integration.test_protocol_commands import evaluate, unit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "ijb_1n"], "--rule ijb_1n is about searches"),
        (["--rule", "argsort_rev"], "--rule argsort_rev is about searches"),
        (["--save-candidates", "c.csv"], "--save-candidates has no effect on --task 1:1"),
        (["--covariate", "YAW"], "--covariate YAW needs --covariates"),
        (["--covariates", "c.csv"], "--covariates c.csv needs --covariate, the name of a column"),
        (["--task", "1:N", "--save-scores", "s.npy"], "--save-scores has no effect on --task 1:N"),
        (["--task", "1:N", "--pairs", "p.txt"], "--pairs has no effect on --task 1:N"),
        (["--task", "1:N", "--covariates", "c.csv"], "--covariates has no effect on --task 1:N"),
        (
            ["--task", "1:N", "--far", "0.1"],
            "--far has no effect on --task 1:N, it belongs to --task 1:1 and covariates",
        ),
        (["--fpir", "0.1"], "--fpir has no effect on --task 1:1, it belongs to --task 1:N; leave it out"),
        (["--task", "covariates", "--fpir", "0.1"], "--fpir has no effect on --task covariates, it belongs to --task"),
        (["--candidates", "5"], "--candidates has no effect on --task 1:1"),
    ],
)
def test_ijb_refuses_what_its_task_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people))
    command = ["evaluate", "ijbc", "--meta", tmp_path / "meta", "--embeddings", file, "--out", tmp_path / "r.json"]
    assert main(list(map(str, [*command, *options]))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("identification", ["--save-scores", "s.npy"]),
        ("verification", ["--save-candidates", "c.csv"]),
        ("verification", ["--resamples", "10"]),
        ("verification", ["--image-gallery"]),
    ],
)
def test_survface_refuses_what_its_task_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, options: list[str]
) -> None:
    keys, people = write_survface(tmp_path / "lists")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people))
    source = ["--root", tmp_path / "lists", "--embeddings", file, "--out", tmp_path / "r.json"]
    assert main(list(map(str, ["evaluate", "survface", "--task", task, *source, *options]))) == 2
    assert f"{options[0]} has no effect on --task {task}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["identification", "--gallery", "g", "--probes", "p", "--far", "1e-3"],
            "--far belongs to verification, lfw, ",
        ),
        (["tinyface", "--lists", "t", "--embeddings", "e", "--far=1e-3"], "--far belongs to verification, lfw, "),
        (["lfw", "--bin", "lfw.bin", "--embeddings", "e", "--fpir", "0.1"], "--fpir belongs to identification, ijbb, "),
        (["verification", "--embeddings", "e", "--pairs", "p", "--fpr", "0.1"], "--fpr 0.1; did you mean --far?\n"),
    ],
)
def test_an_option_of_other_protocols_tells_which(
    capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *command, "--out", "r.json"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_comparison_of_searches_has_no_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people))
    source = ["--meta", tmp_path / "meta", "--embeddings", file, "--resamples", 0]
    for task in ("1:N", "1:1"):
        evaluate(tmp_path, "ijbc", "--task", task, *source, "--details", tmp_path / f"{task}.npz")
    command = ["evaluate", "compare", "--far", "0.1", "--resamples", "10", "--out", str(tmp_path / "c.json")]
    assert main([*command, *[str(tmp_path / "1:N.npz")] * 2]) == 2
    assert "--far 0.1 belongs to pairs (1:1)" in capsys.readouterr().err
    assert main([*command, *[str(tmp_path / "1:1.npz")] * 2]) == 0


@pytest.mark.parametrize("option", ["--far", "--fpir"])
def test_fae_measures_at_one_rate(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "fae", "--model", "m", "--out", "r.json", option, "1e-1,1e-3"])
    assert stop.value.code == 2
    assert "holds 2 rates; here is one" in capsys.readouterr().err


def test_detector_scores_and_qualities_of_the_file_are_used(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "set", TEMPLATES, SAMPLES)
    keys = [line.split(",")[2] for line in SAMPLES]
    values = embeddings_of([int(key[0]) for key in keys], noise=1.0)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    scores = {key: 0.1 + 0.15 * place for place, key in enumerate(keys)}
    stored = read_embeddings(file)
    assert stored.keys is not None
    det_scores = np.array([scores[key] for key in stored.keys.tolist()], np.float32)
    write_embeddings(file, replace(stored, det_scores=det_scores))
    source = ["--manifest", folder, "--embeddings", file, "--resamples", 0, "--far", "1", "--fpir", "1"]
    more = ["--pooling", "N1D1", "--save-candidates", tmp_path / "c.csv"]
    record = evaluate(tmp_path, "templates", *source, *more)
    assert record["curves"]["edc"]["quality"] == "norm"
    rows = dict(zip(keys, values.astype(float), strict=True))
    probe = unit(sum(scores[key] * rows[key] for key in ("1/b.jpg", "1/c.jpg")))
    expected = max(float(probe @ unit(rows[key])) for key in ("1/a.jpg", "2/a.jpg"))
    line = next(line for line in (tmp_path / "c.csv").read_text().splitlines() if line.startswith("p1,1,"))
    assert float(line.split(",")[3]) == pytest.approx(expected, abs=1e-5)
    write_embeddings(file, replace(stored, qualities=det_scores))
    assert evaluate(tmp_path, "templates", *source)["curves"]["edc"]["quality"] == "qualities of the file"


def test_covariates_in_the_layout_of_nist(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    names, people, matches = write_covariates(meta)
    values = embeddings_of(people, noise=2.0)
    file = write_keyed(tmp_path / "e.npz", names, values)
    source = ["--task", "covariates", "--meta", meta, "--covariate", "YAW", "--far", "0.1", "--resamples", 0]
    record = evaluate(tmp_path, "ijbc", *source, "--embeddings", file)
    rows = unit(values.astype(float))
    scores = np.array([rows[a] @ rows[b] for a, b in matches])
    same = np.array([people[a] == people[b] for a, b in matches])
    threshold = np.sort(scores[~same])[::-1][int(0.1 * (~same).sum() + 1e-9)]
    is_front = np.array([a % 3 == 0 for a, _ in matches])
    found = record["metrics"]["tar@far=0.1"]
    assert 0 < found["value"] < 1
    assert found["value"] == pytest.approx((scores[same] > threshold).mean())
    for stratum, chosen in (("front", is_front), ("side", ~is_front)):
        metrics = record["conditions"][f"YAW={stratum}"]["metrics"]
        assert metrics["tar@far=0.1"]["value"] == pytest.approx((scores[same & chosen] > threshold).mean())
        assert metrics["fmr@far=0.1"]["value"] == pytest.approx((scores[~same & chosen] > threshold).mean())
    assert (record["counts"]["templates"], record["counts"]["pairs"]) == (40, 400)
    assert any("the original has 47404001" in warning for warning in record["warnings"])
    lines = (meta / "ijbc_11_covariate_probe_reference.csv").read_text().splitlines()[1:]
    by_template = [f"crops/{line.split(',')[0]}.jpg" for line in lines]
    file = write_keyed(tmp_path / "t.npz", by_template, values)
    assert evaluate(tmp_path, "ijbc", *source, "--embeddings", file)["metrics"]["tar@far=0.1"] == found


def test_a_photograph_of_several_templates_needs_crops_by_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, people, _ = write_covariates(tmp_path / "meta")
    table = tmp_path / "meta" / "ijbc_11_covariate_probe_reference.csv"
    table.write_text(table.read_text().replace(names[2], names[4]))
    file = write_keyed(tmp_path / "e.npz", names, embeddings_of(people))
    command = ["evaluate", "ijbc", "--task", "covariates", "--meta", tmp_path / "meta", "--embeddings", file]
    assert main(list(map(str, [*command, "--out", tmp_path / "r.json"]))) == 2
    assert f"{names[4]} shows the faces of several templates" in capsys.readouterr().err


def test_matches_of_nist_without_labels_are_the_labelled_pairs(tmp_path: Path) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=2.5))
    source = ["--meta", tmp_path / "meta", "--embeddings", file, "--far", "0.1", "--resamples", 0]
    labelled = evaluate(tmp_path, "ijbc", *source)
    matches = evaluate(tmp_path, "ijbc", *source, "--pairs", tmp_path / "meta" / "ijbc_11_G1_G2_matches.csv")
    assert 0 < labelled["metrics"]["tar@far=0.1"]["value"] < 1
    assert matches["metrics"] == labelled["metrics"]
    assert matches["counts"] == labelled["counts"]


def test_other_counts_than_those_of_the_original_are_told(tmp_path: Path) -> None:
    keys, people = write_ijbs(tmp_path / "cs6")
    file = write_keyed(tmp_path / "ijbs.npz", keys, embeddings_of(people))
    source = ["--task", "uav_to_booking", "--protocol", tmp_path / "cs6", "--resamples", 0]
    record = evaluate(tmp_path, "ijbs", *source, "--embeddings", file)
    warned = " ".join(record["warnings"])
    assert "subjects 6 (the original has 202), subject_videos 18 (the original has 3852)" in warned
    keys, people = write_survface(tmp_path / "survface")
    file = write_keyed(tmp_path / "survface.npz", keys, embeddings_of(people))
    source = ["--task", "verification", "--root", tmp_path / "survface", "--embeddings", file]
    warned = " ".join(evaluate(tmp_path, "survface", *source)["warnings"])
    assert "genuine 2 (the original has 5320), impostor 2 (the original has 5320)" in warned


@pytest.mark.parametrize(("subjects", "expected"), [(130, None), (80, None), (79, 130)])
def test_the_counts_of_both_scface_tracks(tmp_path: Path, subjects: int, expected: int | None) -> None:
    people = range(1, 131)
    keys = [f"{s:03d}_frontal.jpg" for s in people]
    keys += [f"{s:03d}_cam{c}_{d}.jpg" for s in people for c in range(1, 6) for d in (1, 2, 3)]
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of([int(key[:3]) for key in keys]))
    (tmp_path / "test.txt").write_text("".join(f"{s:03d}\n" for s in range(1, subjects + 1)))
    track = ["--subjects", tmp_path / "test.txt"] if subjects != 130 else []
    record = evaluate(tmp_path, "scface", "--embeddings", file, *track, "--resamples", 0)
    assert record["counts"]["probes_d2"] == 5 * subjects
    warned = [text for text in record["warnings"] if "the original has" in text]
    assert bool(warned) == (expected is not None)
    if expected is not None:
        assert f"gallery 79 (the original has {expected}), probes_d1 395 (the original has 650)" in warned[0]


def test_a_video_listed_twice_is_one_trial(tmp_path: Path) -> None:
    keys, people = write_ijbs(tmp_path / "cs6")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=0.2))
    source = ["--task", "surveillance_to_single", "--protocol", tmp_path / "cs6", "--embeddings", file]
    before = evaluate(tmp_path, "ijbs", *source, "--resamples", 0)
    for name, line in (
        ("cs6_metadata.csv", "2,videos/21.mp4,0\n"),
        ("cs6_surveillance_to_single-booking_probe.csv", "videos/21.mp4\n"),
        ("galleries/cs6_surveillance_to_single_g1.csv", "2,2,img/201.png\n"),
    ):
        with (tmp_path / "cs6" / name).open("a") as table:
            table.write(line)
    after = evaluate(tmp_path, "ijbs", *source, "--resamples", 0)
    assert after["counts"] == before["counts"]
    assert after["metrics"] == before["metrics"]


def test_ijbs_ranks_are_among_both_galleries(tmp_path: Path) -> None:
    keys, people = write_ijbs(tmp_path / "cs6")
    values = embeddings_of(people, noise=4.0)
    file = write_keyed(tmp_path / "e.npz", keys, values)
    source = ["--task", "surveillance_to_single", "--protocol", tmp_path / "cs6", "--embeddings", file]
    record = evaluate(tmp_path, "ijbs", *source, "--resamples", 0)
    rows = dict(zip(keys, values.astype(float), strict=True))
    gallery = {subject: unit(rows[f"{subject}/img_{subject}01.jpg"]) for subject in range(1, 7)}
    hits = hits_of_half = 0
    for subject in gallery:
        half = range(1, 4) if subject <= 3 else range(4, 7)
        for video in (1, 2):
            frames = [row for key, row in rows.items() if key.startswith(f"{subject}/videos_{subject}{video}_")]
            if not frames:
                continue
            probe = np.sum(frames, axis=0)
            hits += max(gallery, key=lambda s: float(gallery[s] @ probe)) == subject
            hits_of_half += max(half, key=lambda s: float(gallery[s] @ probe)) == subject
    assert 0 < hits < hits_of_half
    assert record["metrics"]["rank_1"]["value"] == pytest.approx(hits / 12)


def test_a_listed_probe_without_images_is_a_failure_and_counts(tmp_path: Path) -> None:
    keys, people = write_ijb(tmp_path / "meta")
    file = write_keyed(tmp_path / "e.npz", keys, embeddings_of(people, noise=0.1))
    with (tmp_path / "meta" / "ijbc_1N_probe_mixed.csv").open("a") as table:
        table.write("999,3,none.jpg\n")
    source = ["--task", "1:N", "--meta", tmp_path / "meta", "--embeddings", file, "--resamples", 0]
    record = evaluate(tmp_path, "ijbc", *source)
    assert record["counts"]["fte_probes"] == 1
    assert record["metrics"]["rank_1"]["value"] == pytest.approx(16 / 17)


def test_the_area_of_survface_counts_those_beyond_the_list(tmp_path: Path) -> None:
    """22 of the people enrolled look like one probe, so that its mate is beyond the list."""
    gallery, probes, strangers = list(range(1, 31)), [1, 2, 3, 4], 6
    folder = tmp_path / "lists"
    folder.mkdir()
    for part, ids in (("gallery", gallery), ("mated_probe", probes)):
        names = {f"{part}_set": cells([f"{p}.jpg" for p in ids]), f"{part}_ids": np.array(ids)[:, None]}
        savemat(folder / f"{part}_img_ID_pairs.mat", names)
    generator = np.random.default_rng(7)
    enrolled = unit(generator.normal(size=(30, 24)))
    sought = enrolled[:4] + 0.3 * generator.normal(size=(4, 24))
    enrolled[8:30] = unit(sought[0] + 0.1 * generator.normal(size=(22, 24)))
    others = generator.normal(size=(strangers, 24)) + 1.5 * enrolled[:strangers]
    keys = [f"gallery/{p}.jpg" for p in gallery] + [f"mated_probe/{p}.jpg" for p in probes]
    keys += [f"unmated_probe/{i}.jpg" for i in range(strangers)]
    file = write_keyed(tmp_path / "e.npz", keys, np.concatenate([enrolled, sought, others]).astype(np.float32))
    record = evaluate(tmp_path, "survface", "--root", folder, "--embeddings", file, "--resamples", 0)
    scores, alarms = unit(sought) @ enrolled.T, (unit(others) @ enrolled.T).max(1)
    wins, misses = 0.0, 0
    for probe in range(4):
        mate = scores[probe, probe]
        if (scores[probe] > mate).sum() >= 20:
            misses += 1
            continue
        wins += sum(mate > alarm for alarm in alarms.tolist())
    assert misses == 1
    assert 0 < wins < 3 * strangers
    assert record["metrics"]["auc_tpir_l"]["value"] == pytest.approx(wins / (4 * strangers))
