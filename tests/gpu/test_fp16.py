"""fp16 with loss scaling where it is fast."""

import pytest
import torch

from tests.helpers.training import COMPARABLE, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_follows_fp32(tmp_path, stage):
    mild = ("optim.lr_per_1024=0.5", f"engine.zero_stage={stage}")
    plain = train(tmp_path / "plain", *COMPARABLE, *mild)
    half = train(tmp_path / "half", *COMPARABLE, *mild, "engine.precision=fp16", "engine.loss_scale={initial: 1024}")
    assert half.losses == pytest.approx(plain.losses, rel=1e-2)


def test_an_overflow_is_skipped(tmp_path):
    trained = train(tmp_path / "run", *COMPARABLE, "engine.precision=fp16", "engine.loss_scale={initial: 1e38}")
    assert trained.grad_norms[0] is None
