import argparse
import json

import pytest

from aroface.errors import DataError
from launch.bench.feeding import run


def arguments(folder, lines, out=None):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return argparse.Namespace(run=folder, out=out)


def line(step, *, img_per_s, wait_s, batch=100):
    return {
        "step": step,
        "samples": step * batch,
        "img_per_s": img_per_s,
        "data_wait_s": wait_s,
        "memory_gib": 1.0 + step,
    }


def test_the_share_is_of_the_step_and_the_warm_up_is_left_out(tmp_path):
    lines = [
        line(10, img_per_s=10.0, wait_s=9.0),  # warm-up
        line(20, img_per_s=1000.0, wait_s=0.001),  # 100 ms a step, 1 % of it
        {"step": 20, "evaluation": "lfw", "metrics": {}},
        line(30, img_per_s=500.0, wait_s=0.006),  # 200 ms a step, 3 %
        line(40, img_per_s=1000.0, wait_s=0.0015),
    ]
    out = tmp_path / "feeding.json"
    assert run(arguments(tmp_path, lines, out)) == 0
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert figures["waiting for a batch, median"]["value"] == pytest.approx(1.5)
    assert figures["waiting for a batch, largest"]["value"] == pytest.approx(3.0)
    assert figures["images per second, median"]["value"] == 1000.0
    assert figures["waiting for a batch, median"]["reached"] is True


def test_a_run_too_short_says_so(tmp_path):
    with pytest.raises(DataError, match="Train longer"):
        run(arguments(tmp_path, [line(10, img_per_s=1.0, wait_s=0.0)]))
    with pytest.raises(DataError, match="run directory"):
        run(argparse.Namespace(run=tmp_path / "absent", out=None))
