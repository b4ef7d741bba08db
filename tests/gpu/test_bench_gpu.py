"""Peaks of a GPU and a step on it, as `aroface bench` measures them."""

import json
import math
from pathlib import Path

import pytest
import torch

from launch.bench.roofline import measure_peaks
from launch.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_gpu_has_peaks():
    peaks = measure_peaks(device="cuda", budget_s=0.01)
    assert peaks.clock == "wall"
    assert {"fp32", "bf16", "fp16"} <= set(peaks.flops_per_s)
    assert all(math.isfinite(rate) and rate > 0 for rate in (*peaks.flops_per_s.values(), peaks.bytes_per_s))


def test_a_step_says_what_the_copy_takes(tmp_path: Path):
    out = tmp_path / "step.json"
    small = ["--width", "0.125", "--image-size", "32", "--batch", "8", "--classes", "20", "--rounds", "1"]
    assert main(["bench", "step", *small, "--ways", "plain", "--out", str(out)]) == 0
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert figures["copy to the device, alone"]["value"] > 0
    assert figures["plain, step"]["of_limit"] > 0
