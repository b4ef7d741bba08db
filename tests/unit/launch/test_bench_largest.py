import argparse
import json

import torch

from launch.bench.largest import add_profile, largest
from launch.bench.output import Report

CPU = torch.device("cpu")


def test_the_operation_that_takes_the_time_is_the_largest(tmp_path):
    square, small = torch.randn(600, 600), torch.randn(10)

    def step():
        _ = square @ square
        _ = small + small

    trace = tmp_path / "trace.json"
    entries, waiting = largest(step, CPU, trace=trace)
    assert entries[0].name == "aten::mm"
    assert entries[0].calls == 1
    assert {"aten::mm", "aten::add"} <= {entry.name for entry in entries}
    assert 0 < sum(entry.share for entry in entries) + waiting <= 1 + 1e-9
    assert json.loads(trace.read_text())["traceEvents"]


def test_five_of_every_way_are_reported(tmp_path, capsys):
    report = Report("step", (), vars(argparse.Namespace()))

    def step():
        values = torch.randn(300, 300)
        _ = (values @ values).exp().sin().cos().tanh().sum()

    add_profile(report, {"plain": step, "best_of 2": step}, tmp_path / "traces" / "profile.json", CPU)
    printed = capsys.readouterr().out
    assert printed.count("% of a step") == 2 * 6
    assert "plain, 5." in printed
    assert {path.name for path in (tmp_path / "traces").iterdir()} == {"plain-profile.json", "best_of-2-profile.json"}
    assert set(report.details["profiles"]) == {"plain", "best_of 2"}
