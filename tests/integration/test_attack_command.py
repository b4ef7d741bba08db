"""`aroface attack` draws every way and measures its strength."""

import json

import matplotlib.image
import pytest

from launch.attacked_run import WAYS
from launch.cli import main
from tests.integration.test_train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawn_shards):
    directory = tmp_path_factory.mktemp("attack") / "run"
    settings = ["schedule.epochs=0.5", "schedule.warmup_epochs=0", "alignment.kind=none", "data.augment.flip=0.5"]
    assert train(directory, drawn_shards, *settings) == 0
    return directory


def test_every_way_is_drawn(tmp_path, run, capsys):
    out = tmp_path / "attack.png"
    options = ["--images", "3", "--sample", "12", "--ways", "all"]
    assert main(["attack", str(run), "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert all(way in printed for way in ("clean", *WAYS))
    assert matplotlib.image.imread(out).shape[0] > 130 * (1 + len(WAYS))


@pytest.mark.slow
def test_strength_counts_from_clean_to_exact(tmp_path, run):
    out = tmp_path / "strength.json"
    assert main(["attack", str(run), "--strength", str(out), "--batches", "1", "--batch", "16"]) == 0
    ways = json.loads(out.read_text())["ways"]
    assert set(ways) == {"clean", *WAYS}
    for kind in ("kept_training", "kept_running"):
        assert ways["clean"][kind] == [0.0, 0.0, 0.0]
        assert ways["adversarial (batch)"][kind] == [1.0, 1.0, 1.0]
    assert ways["best_of 16"]["loss_training"] > ways["best_of 2"]["loss_training"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --out FILE.png for a picture, or --strength FILE.json"),
        (["--out", "x.png", "--ways", "worst"], "'worst' is unknown; choose of random, adversarial"),
        (["--out", "x.png", "--images", "9", "--sample", "4"], "--images 9 must lie between 1 and --sample 4"),
        (["--strength", "x.json", "--batch", "6"], "--batch must be a multiple of 4"),
    ],
)
def test_bad_options_are_named(run, capsys, options, message):
    assert main(["attack", str(run), *options]) == 2
    assert message in capsys.readouterr().err
