"""Settings of the attack that do not make sense together are named, with the way out."""

import pytest
import torch

from aroface.alignment import landmark_displacement_px
from aroface.alignment.attack import start_alignment
from aroface.config import parse_config
from aroface.config.schema import AlignmentConfig
from aroface.errors import ConfigError


@pytest.mark.parametrize("kind", ["none", "random", "adversarial", "delayed", "best_of", "elastic"])
def test_the_defaults_of_every_kind_are_valid(kind):
    assert AlignmentConfig(kind=kind).share == 0.25


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, "batch", "running"),
        ({"batch_statistics": "batch"}, "batch", "batch"),
        ({"batch_statistics": "running"}, "running", "running"),
        ({"kind": "best_of"}, "batch", "running"),
        ({"kind": "delayed"}, "batch", "batch"),
        ({"release_compat": True}, "batch", "batch"),
    ],
)
def test_running_averages_are_used_once_they_have_settled(settings, before, after):
    config = AlignmentConfig(**{"kind": "adversarial", **settings})
    assert [config.statistics_at(step) for step in (0, 99, 100, 10**6)] == [before, before, after, after]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "random", "share": 0.0}, "share = 0 leaves nothing for kind = random; set kind: none"),
        ({"kind": "delayed", "share": 0.75}, "at most 0.5 can be warped; lower share, or use kind: adversarial"),
        ({"kind": "delayed", "steps": 2}, "gave one gradient; set steps: 1"),
        ({"kind": "delayed", "batch_statistics": "running"}, "set batch_statistics: batch"),
        ({"kind": "best_of", "candidates": 17}, "candidates = 17: input should be less than or equal to 16"),
        ({"kind": "adversarial", "steps": 0}, "steps = 0: input should be greater than or equal to 1"),
        ({"kind": "adversarial", "angle_step_rad": 0.3}, "lower the step to at most 0.2, or widen the box"),
        ({"kind": "adversarial", "shift_box": 0.01, "shift_step": 0.01}, "starts outside of shift_box = 0.01"),
        (
            {"kind": "adversarial", "scale_step": 0.0, "angle_step_rad": 0.0, "shift_step": 0.0},
            "nothing but the start noise moves; set one above 0, or kind: none",
        ),
        ({"kind": "adversarial", "landmark_budget_px": 0.9}, "raise landmark_budget_px, or lower start_noise"),
        ({"kind": "adversarial", "landmark_budget_px": float("nan")}, "finite number"),
        (
            {"kind": "random", "release_compat": True},
            "release_compat = true has no kind: random; set kind: adversarial",
        ),
        (
            {"kind": "adversarial", "release_compat": True, "landmark_budget_px": 8.0},
            "landmark_budget_px is not in the published code; set landmark_budget_px: null",
        ),
        ({"kind": "elastic", "elastic": {"amplitude_px": 15.0, "step_px": 1.0}}, "lower amplitude_px to at most 13.68"),
        ({"kind": "elastic", "elastic": {"amplitude_px": 1.0}}, "leaves amplitude_px = 1.0 with the first step"),
        (
            {"kind": "elastic", "elastic": {"spacing": 8.0}},
            "elastic.spacing is not a setting; did you mean elastic.spacing_px?",
        ),
        ({"kind": "adverserial"}, "input should be 'none', 'random', 'adversarial'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        parse_config(settings, AlignmentConfig, name="run.yaml")
    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        parse_config({"kind": "delayed", "share": 0.9, "steps": 5}, AlignmentConfig, name="run.yaml")
    assert "share = 0.9" in str(error.value)
    assert "steps = 5" in str(error.value)


def test_what_does_not_run_may_be_anything_valid():
    """`alignment.kind=none` on the command line must work whatever the file says."""
    assert AlignmentConfig(kind="none", share=0.0, landmark_budget_px=0.1).kind == "none"


def test_start_displacement_is_the_rms_over_draws():
    config = AlignmentConfig(kind="adversarial", start_noise=0.01)
    draws = start_alignment(40000, config, torch.Generator().manual_seed(0))
    measured = landmark_displacement_px(draws).square().mean(0).sqrt().max()
    assert float(measured) == pytest.approx(config.start_displacement_px, rel=0.02)
