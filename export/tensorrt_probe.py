"""Whether this machine can build and run TensorRT engines, found out in a process that may crash.

TensorRT's runtime has been seen to end the process where there is no GPU, so it is first tried in another one.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass

from aroface.devices import own_gpu
from aroface.errors import ExportError

__all__ = ["GpuState", "require_tensorrt"]

_TIMEOUT_S = 120
_OLDEST = (10, 9)
_PROGRAM = """
import json, sys, torch
state = {"cuda": torch.cuda.is_available()}
if state["cuda"]:
    properties = torch.cuda.get_device_properties(int(sys.argv[1]))
    state["device"] = properties.name
    state["compute_capability"] = f"{properties.major}.{properties.minor}"
    state["cuda_version"] = torch.version.cuda
    import tensorrt
    class Quiet(tensorrt.ILogger):
        def __init__(self):
            tensorrt.ILogger.__init__(self)
        def log(self, severity, message):
            pass
    logger = Quiet()
    state["tensorrt_version"] = tensorrt.__version__
    state["runtime"] = tensorrt.Runtime(logger) is not None
print(json.dumps(state))
"""


@dataclass(frozen=True)
class GpuState:
    """The GPU of this process and the TensorRT of this machine."""

    tensorrt_version: str
    device: str
    compute_capability: str  #: such as `9.0`
    cuda_version: str

    @property
    def tensorrt_release(self) -> str:
        """Major and minor version: engines are exchanged within one."""
        return ".".join(self.tensorrt_version.split(".")[:2])


def require_tensorrt() -> GpuState:
    """What is there.

    Raises:
        ExportError: no TensorRT, an old one, no GPU, or both are there and do not work.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise ExportError(
            "TensorRT is not installed. Engines are built and run on a machine with an NVIDIA GPU: `pip install "
            "tensorrt` there, and `aroface export MODEL.onnx --to tensorrt --out MODEL.engine`. The ONNX file may be "
            "made anywhere, with `aroface export CHECKPOINT --to onnx`."
        )
    done = _probe()
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(
            f"TensorRT is installed but does not start (exit code {done.returncode}: {last}). `pip install --upgrade "
            "tensorrt` in the version for the CUDA of the driver (`nvidia-smi` names it), and check `aroface doctor`."
        )
    state = json.loads(done.stdout.strip().splitlines()[-1])
    if not state["cuda"]:
        raise ExportError(
            "There is no NVIDIA GPU here, or this build of PyTorch cannot use it (`python -c 'import torch; "
            "print(torch.cuda.is_available())'`). An engine is built on the GPU that will run it: export with --to "
            "onnx here, copy the file, and run `aroface export MODEL.onnx --to tensorrt --out MODEL.engine` there."
        )
    found = GpuState(
        str(state["tensorrt_version"]),
        str(state["device"]),
        str(state["compute_capability"]),
        str(state["cuda_version"]),
    )
    if tuple(int(part) for part in found.tensorrt_release.split(".")) < _OLDEST:
        raise ExportError(
            f"TensorRT {found.tensorrt_version} is too old; {'.'.join(map(str, _OLDEST))} or newer is needed. "
            "`pip install --upgrade tensorrt`."
        )
    return found


def _probe() -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(own_gpu() or 0)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", f"no answer within {_TIMEOUT_S} s")
