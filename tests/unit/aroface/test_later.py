"""Numbers that are read later are those of the moment when they were sent."""

import torch

from aroface.later import Later


def test_what_was_sent_is_read_whatever_came_since():
    values = torch.tensor([1.0, float("inf"), 3.0], dtype=torch.float64)
    later = Later(values)
    values.zero_()
    assert later.read() == [1.0, float("inf"), 3.0]
    assert later.read() == [1.0, float("inf"), 3.0]
