"""No process group that a training uses waits longer than it is told."""

import datetime

import pytest
import torch

from tests.helpers.training import COMPARABLE, train


@pytest.mark.parametrize("seconds", [77, 78])
def test_the_group_that_deepspeed_makes_waits_as_long_as_set(tmp_path, seconds):
    from deepspeed.utils import groups

    train(tmp_path / "run", *COMPARABLE, f"engine.timeout_s={seconds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = groups._clone_world_group()._get_backend(device)
    assert backend.options._timeout == datetime.timedelta(seconds=seconds)
