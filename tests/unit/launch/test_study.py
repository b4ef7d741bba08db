"""The plan of a study, and its statistics against scipy's."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel

from aroface.config.alignment import AlignmentConfig
from aroface.errors import ConfigError
from launch.plan.passes import extra_passes
from launch.study.design import load_study
from launch.study.pages import draw, to_json, to_markdown
from launch.study.runner import RESULTS, is_finished, run_directory
from launch.study.summary import METRICS, paired, summarise

STUDY = Path(__file__).parents[3] / "configs" / "study" / "alignment.yaml"


@pytest.fixture
def study():
    return load_study(STUDY, has_gpu=False)


def write_results(directory, level):
    directory.mkdir(parents=True)
    value = {"value": level}
    low_quality = {"rank_1@clean": value, "rank_1@40px": value, "rank_1@14px": {"value": level / 2}}
    records = {
        "lfw-lq": {"metrics": low_quality | {"tar@far=1e-2": value, "rank_1_first_300": {"value": 1.0}}},
        "fae": {"metrics": {"area_rank_1@severity": value}},
    }
    for name, record in records.items():
        (directory / RESULTS[name]).write_text(json.dumps(record), encoding="utf-8")


def test_equal_passes_cost_the_same_and_free_attacks_are_trained_once(study):
    share, candidates = 0.25, study.config.alignments["best_of"].candidates
    extra = {"adversarial": 2 * share, "best_of": candidates * share}
    runs = list(study.runs())
    work = {
        run.arm.alignment: run.epochs * (3 + extra.get(run.arm.alignment, 0))
        for run in runs
        if run.arm.budget == "passes"
    }
    assert work.keys() == extra.keys()
    assert list(work.values()) == pytest.approx([3 * study.schedule.epochs] * len(work), rel=1e-4)
    equal = [run for run in runs if run.arm.budget == "epochs"]
    assert {run.epochs for run in equal} == {study.schedule.epochs}
    assert len(equal) == 3 * 2 * 5
    assert study.arm_of("arcface", "random", "passes").budget == "epochs"


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"kind": "adversarial", "share": 0.25, "steps": 3}, 1.5),
        ({"kind": "adversarial", "share": 0.25, "steps": 3, "release_compat": True}, 6.0),
        ({"kind": "elastic", "share": 0.5}, 1.0),
        ({"kind": "adversarial", "share": 0.25, "consistency_weight": 1.0}, 0.75),
        ({"kind": "best_of", "share": 0.25, "candidates": 4, "consistency_weight": 1.0}, 1.25),
        ({"kind": "random", "share": 0.25, "consistency_weight": 1.0}, 0.25),
        ({"kind": "delayed", "share": 0.25}, 0.0),
        ({"kind": "none", "consistency_weight": 1.0}, 0.0),
    ],
)
def test_passes_of_every_kind(settings, passes):
    assert extra_passes(AlignmentConfig(**settings)).total == pytest.approx(passes)


def test_a_gpu_gets_its_own_base():
    assert load_study(STUDY, has_gpu=True).base.name == "faces-112px.yaml"
    assert load_study(STUDY, has_gpu=False).base.name == "faces-32px.yaml"


def test_what_is_not_supported_is_marked(study, tmp_path):
    run = next(study.runs())
    write_results(run_directory(tmp_path, run), 0.5)
    path = run_directory(tmp_path, run) / RESULTS["lfw-lq"]
    text = to_markdown(study, summarise(study, tmp_path), command="aroface study", machine={})
    assert "\\*" not in text
    record = json.loads(path.read_text(encoding="utf-8"))
    record["metrics"]["tar@far=1e-2"]["supported"] = False
    path.write_text(json.dumps(record), encoding="utf-8")
    summary = summarise(study, tmp_path)
    assert summary.unsupported == ["tar"]
    text = to_markdown(study, summary, command="aroface study", machine={})
    assert "| TAR at FAR 1e-2 \\* |" in text
    assert "not statistically supported" in text
    assert to_json(summary)["unsupported"] == ["tar"]


def test_first_seed_comes_whole(study):
    seeds = [run.seed for run in study.runs()]
    assert seeds == sorted(seeds)


def test_difference_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    first, second = rng.random(6), rng.random(6)
    interval = ttest_rel(first, second).confidence_interval(0.95)
    found = paired(first, second)
    assert [found.mean, found.low, found.high] == pytest.approx([np.mean(first - second), *interval], rel=1e-12)
    assert paired([0.5], [0.25]).to_json() == {"mean": 0.25, "ci95": None, "pairs": 1}


def test_summary_pairs_by_seed_and_leaves_out_what_is_not_finished(study, tmp_path):
    levels = {"none": 0.2, "random": 0.3}
    for run in study.runs():
        if run.arm.alignment in levels and (run.arm.alignment, run.seed) != ("random", 2):
            write_results(run_directory(tmp_path, run), levels[run.arm.alignment] + run.seed / 100)
    summary = summarise(study, tmp_path)
    assert (summary.finished, summary.planned) == (2 * (3 + 2), 42)
    row = next(r for r in summary.rows if (r.head, r.alignment, r.budget) == ("arcface", "random", "passes"))
    assert row.values["clean"] == pytest.approx([0.3, 0.31])
    assert row.values["low_quality"] == pytest.approx([0.225, 0.2325])
    difference = row.differences["none"]["clean"]
    assert (difference.pairs, difference.mean) == (2, pytest.approx(0.1))
    together = next(r for r in summary.rows if (r.head, r.alignment) == ("all heads", "random"))
    assert together.differences["none"]["tar"].pairs == 4
    missing = next(r for r in summary.rows if (r.head, r.alignment) == ("adaface", "delayed"))
    assert missing.values["clean"] == []
    assert missing.differences["none"] == {}

    text = to_markdown(study, summary, command="aroface study", machine={"cpu": "x"})
    assert "10 of 42 finished" in text
    assert "| arcface | random | 2 | **+10.00** [+10.00, +10.00] |" in text
    assert json.loads(json.dumps(to_json(summary), allow_nan=False))["planned_runs"] == 42
    draw(study, summary, tmp_path / "study.svg")
    assert all(heading.split(",")[0] in (tmp_path / "study.svg").read_text() for heading in METRICS.values())


def test_a_run_with_one_result_is_not_finished(study, tmp_path):
    run = next(study.runs())
    write_results(run_directory(tmp_path, run), 0.5)
    assert is_finished(tmp_path, run)
    (run_directory(tmp_path, run) / RESULTS["fae"]).unlink()
    assert not is_finished(tmp_path, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": ["nobody"]}, r"references names \['nobody'\]"),
        ({"seeds": [1, 1]}, "repeats one"),
        ({"base": "missing.yaml"}, "is not a file beside it"),
        ({"jobs": 2}, "jobs is not a setting"),
    ],
)
def test_wrong_studies_are_refused(tmp_path, change, message):
    values = yaml.safe_load(STUDY.read_text(encoding="utf-8")) | change
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "faces-32px.yaml").write_text((STUDY.parent / "faces-32px.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match=message):
        load_study(tmp_path / "study.yaml")
