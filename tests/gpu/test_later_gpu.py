"""Reading later waits for the numbers, not for the work that was asked of the GPU since."""

import pytest
import torch

from aroface.later import Later

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_reading_does_not_wait_for_later_work():
    left, right = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    values = left[0, :3].double()
    wanted = values.tolist()
    later = Later(values)
    values.zero_()
    for _ in range(40):
        left = left @ right * 1e-2
    done = torch.cuda.Event()
    done.record()
    assert later.read() == wanted
    assert not done.query()  # forty products of a teraflop each
    torch.cuda.synchronize()
    assert later.read() == wanted
