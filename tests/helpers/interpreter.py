"""Triton's interpreter, which runs kernels on the CPU; it is chosen for a whole process, at import."""

import os
import subprocess
import sys

import pytest


def run_in_interpreter(module: str) -> None:
    """Run a module of checks in a process of its own; what it raises fails the test."""
    pytest.importorskip("triton", reason="the fused kernels need triton; it comes with PyTorch for CUDA")
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
