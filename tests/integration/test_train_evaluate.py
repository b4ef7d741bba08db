"""Evaluation while training: the numbers are those of the offline commands, and training does not notice."""

import json
import shutil

import numpy as np
import pytest
import torch

from aroface.config.evaluate import EvaluateConfig
from aroface.contract import InputContract
from aroface.engine.checkpoint_layout import list_checkpoints
from aroface.engine.evaluation import PeriodicEvaluation
from aroface.errors import ConfigError, DataError
from launch.cli import main
from launch.training_evaluators import embed_by_turns, open_evaluators
from shards.faces import open_face_set
from tests.helpers.ranks import run_on_ranks
from tests.helpers.training import config_of, evaluations, train

METRIC = "rank_1@14px"


def evaluate(faces, *, every=3, best="{set: lq, metric: rank_1@14px}"):
    pairs = f"{{kind: verification, name: pairs, faces: {faces}}}"
    low = f"{{kind: lfw_lq, name: lq, faces: {faces}, sizes_px: [28, 14]}}"
    return f"evaluate={{every_steps: {every}, sets: [{pairs}, {low}], best: {best}}}"


def evaluators(faces, **options):
    return open_evaluators(config_of(evaluate(faces, **options)).evaluate)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, drawn_faces):
    """Six steps with evaluations after 2, 4 and 6 on a run directory, and what training gave."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    settings = (evaluate(drawn_faces, every=2), "checkpoint.every_steps=6", "checkpoint.keep_last=1")
    settings = (*settings, "log.tensorboard=true")
    return run, train(run, *settings, evaluators=evaluators(drawn_faces, every=2))


def test_training_does_not_notice(trained, tmp_path):
    plain = train(tmp_path / "plain", "checkpoint.every_steps=6")
    _, watched = trained
    assert watched.losses == plain.losses
    assert [k for k, value in plain.tensors.items() if not torch.equal(value, watched.tensors[k])] == []


def test_the_log_has_lines_of_a_fixed_form(trained):
    run, _ = trained
    lines = evaluations(run)
    assert [(line["step"], line["evaluation"]) for line in lines] == [
        (step, name) for step in (2, 4, 6) for name in ("pairs", "lq")
    ]
    keys = {"step", "samples", "evaluation", "metrics", "is_best", "elapsed_s"}
    assert all(line.keys() == keys for line in lines)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    points = [(point.step, pytest.approx(point.value)) for point in events.Scalars(f"lq/{METRIC}")]
    assert [(line["step"], line["metrics"][METRIC]) for line in lines if line["evaluation"] == "lq"] == points


def test_the_numbers_are_those_of_the_command(trained, drawn_faces, tmp_path):
    run, _ = trained
    out = tmp_path / "r.json"
    step = list_checkpoints(run)[-1]
    command = ["evaluate", "lfw-lq", "--model", str(step), "--faces", str(drawn_faces), "--sizes", "28,14"]
    assert main([*command, "--threads", "1", "--out", str(out)]) == 0
    offline = {name: entry["value"] for name, entry in json.loads(out.read_text())["metrics"].items()}
    online = next(line for line in evaluations(run) if line["step"] == 6 and line["evaluation"] == "lq")["metrics"]
    offline["accuracy_best_threshold"] = offline.pop("accuracy")
    assert online.keys() == offline.keys()
    for name, value in offline.items():
        assert online[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name


def test_the_best_is_kept_and_labelled(trained, capsys):
    run, _ = trained
    lines = [line for line in evaluations(run) if line["evaluation"] == "lq"]
    values = [line["metrics"][METRIC] for line in lines]
    best = lines[int(np.argmax(values))]  # the first of equal ones
    assert [line["is_best"] for line in lines] == [value > max([-1, *values[:i]]) for i, value in enumerate(values)]
    record = json.loads((run / "best.json").read_text())
    assert record["step"] == best["step"]
    assert record["selected_on"] == {"set": "lq", "metric": METRIC, "value": best["metrics"][METRIC]}
    assert record["note"].startswith("Selected on lq: its numbers there are optimistic")
    assert {path.name for path in list_checkpoints(run)} == {record["checkpoint"], "step-00000006"}
    assert main(["checkpoint", "info", str(run / record["checkpoint"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == f"whole, best by {METRIC} on lq"


def test_a_resume_remembers_the_best(trained, drawn_faces, tmp_path):
    """Stopped after 4 of 6 steps and continued: the same evaluations, the same best."""
    run = tmp_path / "run"
    settings = (evaluate(drawn_faces, every=2), "checkpoint.every_steps=6", "checkpoint.keep_last=1")
    train(run, *settings, evaluators=evaluators(drawn_faces, every=2), stop_after=5)
    train(run, *settings, evaluators=evaluators(drawn_faces, every=2))
    whole, _ = trained
    fixed = ("step", "evaluation", "metrics", "is_best")
    lines = [[{key: line[key] for key in fixed} for line in evaluations(one)] for one in (whole, run)]
    assert lines[0] == lines[1]
    assert (run / "best.json").read_text() == (whole / "best.json").read_text()


def test_the_best_stays_when_evaluation_is_switched_off_and_stays_behind_in_a_branch(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    kept = (run / "best.json").read_text()
    train(run, "checkpoint.every_steps=6", "checkpoint.keep_last=1")
    assert (run / "best.json").read_text() == kept
    train(tmp_path / "branch", "schedule.epochs=1.5", resume=run)
    assert not (tmp_path / "branch" / "best.json").exists()


def test_every_batch_of_an_evaluation_shows_that_the_rank_is_alive(drawn_faces):
    config = config_of(evaluate(drawn_faces, every=2), "evaluate.batch_size=10").evaluate
    beats = []
    evaluation = PeriodicEvaluation(config, open_evaluators(config), best=None)
    evaluation.run(MeanColour(), step=2, samples=24, on_progress=lambda: beats.append(1))
    images = 72  # the second set also has degraded ones
    assert len(beats) > 2 * images // 10


@pytest.mark.parametrize(
    ("best", "told"),
    [
        (
            "{set: lq, metric: rank_1@13px}",
            r"rank_1@13px is no number that the set lq gives; choose from .*rank_1@14px",
        ),
        (
            "{set: pairs, metric: accuracy}",
            r"metric = accuracy is .* choose from accuracy_best_threshold, tar@far=1e-1",
        ),
    ],
    ids=["misspelt", "null on drawn pairs"],
)
def test_a_metric_that_does_not_exist_is_named_before_the_first_step(drawn_faces, tmp_path, best, told):
    with pytest.raises(ConfigError, match=told):
        train(tmp_path / "run", evaluate(drawn_faces, best=best), evaluators=evaluators(drawn_faces, best=best))
    assert not (tmp_path / "run").exists()


def test_the_names_of_the_numbers_are_known_without_a_model(drawn_faces):
    for evaluator in evaluators(drawn_faces):
        numbers = evaluator.evaluate(MeanColour())
        assert set(evaluator.metric_names()) == {name for name, value in numbers.items() if value is not None}


def test_sets_have_names_of_their_own():
    one = {"kind": "verification", "name": "a", "faces": "x"}
    with pytest.raises(ValueError, match="has a twice"):
        EvaluateConfig.model_validate({"every_steps": 1, "sets": [one, one]})
    with pytest.raises(ValueError, match="is none of the sets; choose from a"):
        EvaluateConfig.model_validate({"every_steps": 1, "sets": [one], "best": {"set": "b", "metric": "c"}})


def test_a_missing_set_costs_no_training(drawn_shards, tmp_path, capsys):
    from pathlib import Path

    config = str(Path(__file__).parents[2] / "configs" / "smoke" / "tiny.yaml")
    command = ["train", config, f"data.shards={drawn_shards}", evaluate("nowhere"), "--run", str(tmp_path / "run")]
    assert main(command) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class MeanColour:
    """An embedder without a network."""

    embedding_dim, model_id = 3, "mean"
    contract = InputContract(image_size=112, colour_order="rgb")

    def embed(self, images):
        return images.reshape(len(images), -1, 3).mean(1).astype(np.float32)


def by_turns(rank, ranks, folder, count):
    found = embed_by_turns(MeanColour(), open_face_set(folder), indices=range(count), flip="sum", batch_size=4)
    return found.embeddings.embeddings, found.embeddings.enrolled, list(found.embeddings.keys)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 13])
def test_ranks_take_turns_and_get_the_same(drawn_faces, tmp_path, count):
    """On 3 ranks as on one, with fewer images than ranks and with one that cannot be read."""
    folder = shutil.copytree(drawn_faces, tmp_path / "faces")
    images = sorted(folder.rglob("*.jpg"))
    images[7].write_bytes(b"no image")
    embeddings, enrolled, keys = by_turns(0, 1, folder, count)
    assert int((~enrolled).sum()) == (count > 7)
    for other in run_on_ranks(by_turns, 3, folder, count, timeout_s=300):
        assert np.array_equal(other[0], embeddings)
        assert np.array_equal(other[1], enrolled)
        assert other[2] == keys


def failing(rank, ranks, folder):
    class Failing(MeanColour):
        def embed(self, images):
            return super().embed(images) * (np.nan if rank == 1 else 1)

    try:
        embed_by_turns(Failing(), open_face_set(folder))
    except DataError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_an_error_on_one_rank_is_an_error_on_all(drawn_faces):
    first, second = run_on_ranks(failing, 2, drawn_faces, timeout_s=300)
    assert "Another rank could not embed its share" in first
    assert "gives an embedding that is not finite" in second
