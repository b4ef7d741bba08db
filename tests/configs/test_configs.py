"""Every shipped configuration loads, says where it comes from, and describes a network that can be built."""

from pathlib import Path

import pytest
import torch

from aroface.config import TrainConfig, dump_config, load_config, parse_config
from aroface.config.load import read_yaml
from aroface.models import build_backbone
from launch.study.design import load_study

ROOT = Path(__file__).parents[2]
STUDIES = [ROOT / "configs" / "study" / name for name in ("alignment.yaml", "attack-statistics.yaml")]
FILES = sorted({*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("launch/recipes/*.yaml")} - set(STUDIES))
HEADER = ("# Source:", "# Expected:", "# Hardware:", "# Command:")


def test_there_are_configurations():
    assert len(FILES) >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_is_complete(path):
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    for heading in HEADER:
        assert any(line.startswith(heading) and len(line) > len(heading) + 3 for line in comments), heading


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_builds_and_survives_a_round_trip(path):
    config = load_config(path, TrainConfig)
    assert parse_config(read_yaml(dump_config(config), name="dump"), TrainConfig, name="dump") == config
    with torch.device("meta"):
        backbone = build_backbone(config.model)
    assert sum(p.numel() for p in backbone.parameters()) > 0


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_study_is_a_whole_configuration(path, has_gpu):
    names = [run.name for run in load_study(path, has_gpu=has_gpu).runs()]  # each is checked on the way
    assert len(set(names)) == len(names) > 0
