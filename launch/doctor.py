"""What works on this machine, found by trying it in small. Every check names the fix for what it finds broken."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

__all__ = ["CHECKS", "Finding", "examine"]

Status = Literal["ok", "absent", "broken"]

_PACKAGES = ("aroface", "shards", "export", "retrieval", "launch")
#: distribution -> what it is needed for; without the first group the main job cannot run.
_REQUIRED = {
    "torch": "models",
    "numpy": "arrays",
    "deepspeed": "training",
    "onnx": "export",
    "onnxruntime": "running exported models",
    "opencv-python-headless": "image files",
    "simplejpeg": "fast JPEG decoding",
    "pydantic": "configuration",
    "safetensors": "checkpoints",
    "matplotlib": "reports",
    "scipy": "protocol files",
}
_OPTIONAL = {
    "webdataset": "streaming remote shards",
    "tensorboard": "training curves",
    "tensorrt": "TensorRT engines",
    "openvino": "exported models on Intel processors",
    "pymilvus": "galleries in Milvus",
    "fastapi": "aroface serve",
}
_CHILD_TIMEOUT_S = 60
_INSTALL = "make setup, or pip install --constraint requirements.lock --editable '.[all]'"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    status: Status
    detail: str
    fix: str = ""
    is_required: bool = False  #: the quick start cannot run while it is not ok


def examine() -> list[Finding]:
    """Run every check; a check that raises is itself a finding."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:  # the doctor reports whatever it meets
            name = check.__name__.removeprefix("_check_").replace("_", " ")
            findings.append(Finding(name, "broken", f"{type(error).__name__}: {error}", "see the error"))
    return findings


def _check_machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [
        Finding("python", "ok" if sys.version_info >= (3, 11) else "broken", python, "use Python 3.11 or newer", True),
        Finding("processor", "ok", f"{cores} cores available"),
        Finding("memory", "ok" if memory_gib > 6 else "broken", f"{memory_gib:.1f} GiB", "the quick start wants 6 GiB"),
        Finding("disk here", "ok" if disk_gib > 2 else "broken", f"{disk_gib:.1f} GiB free", "free 2 GiB", True),
    ]
    threads = os.environ.get("OMP_WAIT_POLICY", "unset")
    if threads.upper() != "PASSIVE":
        findings.append(
            Finding(
                "OMP_WAIT_POLICY",
                "broken",
                threads,
                "export OMP_WAIT_POLICY=PASSIVE: spinning threads waste a busy CPU",
            )
        )
    return findings


def _check_packages_together() -> list[Finding]:
    """The five packages have common names; another distribution may own one of them."""
    parents = {name: _parent_of(name) for name in _PACKAGES}
    if len(set(parents.values())) == 1:
        return [Finding("packages", "ok", f"all five in {parents['aroface']}", is_required=True)]
    wrong = next(name for name in _PACKAGES if parents[name] != parents["aroface"])
    detail = f"aroface lies in {parents['aroface']}, but {wrong} in {parents[wrong]}"
    return [
        Finding(
            "packages",
            "broken",
            detail,
            f"another distribution installs {wrong!r}: use an environment of our own",
            True,
        )
    ]


def _parent_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return Path("(not found)")
    return Path(spec.origin).resolve().parents[1]


def _check_versions() -> list[Finding]:
    findings = []
    for names, is_required in ((_REQUIRED, True), (_OPTIONAL, False)):
        for name, purpose in names.items():
            try:
                findings.append(Finding(name, "ok", f"{version(name)} ({purpose})", is_required=is_required))
            except PackageNotFoundError:
                fix = "on a GPU machine: pip install tensorrt" if name == "tensorrt" else _INSTALL
                findings.append(Finding(name, "absent", purpose, fix, is_required))
    return findings


def _check_accelerators() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"PyTorch {torch.__version__} " + ("with CUDA, but no GPU answers" if torch.version.cuda else "for CPU")
        fix = "check nvidia-smi and the driver" if torch.version.cuda else "on a GPU machine: make clean setup"
        return [Finding("GPU", "absent", built, fix)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, {free / 2**30:.0f} of "
            f"{total / 2**30:.0f} GiB free, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
        findings.append(Finding(f"GPU {index}", "ok", detail))
    return findings


def _check_cpu_arithmetic() -> list[Finding]:
    import torch

    from aroface.bf16 import has_bf16_units

    left = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    error = float((left.bfloat16() @ left.bfloat16()).float().sub(left @ left).abs().max())
    units = "units for it" if has_bf16_units() else "no units for it: trainings take fp32"
    detail = f"{torch.backends.cpu.get_cpu_capability()}, {units}; error {error:.3f} of a 64 x 64 product"
    return [Finding("bf16 on CPU", "ok" if error < 1 else "broken", detail)]


def _check_collectives() -> list[Finding]:
    import torch

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    code = (
        "import torch, torch.distributed as d\n"
        "from torch._C._distributed_c10d import HashStore\n"
        f"d.init_process_group({backend!r}, store=HashStore(), rank=0, world_size=1)\n"
        f"x = torch.ones(1, device={('cuda' if backend == 'nccl' else 'cpu')!r})\n"
        "d.all_reduce(x)\n"
        "print(x.item())\n"
    )
    return [
        _try_in_child(
            f"{backend} collectives",
            code,
            "1.0",
            "check the network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        )
    ]


def _check_deepspeed() -> list[Finding]:
    code = "import os; os.environ.setdefault('DS_ACCELERATOR', 'cpu')\nimport deepspeed\nprint('imported')\n"
    return [_try_in_child("deepspeed import", code, "imported", _INSTALL, is_required=True)]


def _check_search() -> list[Finding]:
    code = (
        "import faiss, numpy as np\n"
        "index = faiss.IndexFlatIP(4); index.add(np.eye(4, dtype='float32'))\n"
        "print(index.search(np.eye(4, dtype='float32')[2:3], 1)[1][0, 0])\n"
    )
    finding = _try_in_child("Faiss search", code, "2", _INSTALL, is_required=True)
    return [finding]


def _check_onnx_runtime() -> list[Finding]:
    import onnxruntime

    return [Finding("ONNX Runtime", "ok", ", ".join(onnxruntime.get_available_providers()), is_required=True)]


def _check_tensorrt() -> list[Finding]:
    """In a process of its own: without a GPU the runtime has been seen to crash."""
    try:
        version("tensorrt")
    except PackageNotFoundError:
        return []
    return [_try_in_child("TensorRT import", "import tensorrt\nprint('imported')\n", "imported", "reinstall tensorrt")]


def _check_jpeg() -> list[Finding]:
    import numpy as np

    from aroface.images import decode_rgb, encode_jpeg

    pixels = decode_rgb(encode_jpeg(np.full((16, 16, 3), 100, np.uint8)))
    is_right = int(abs(pixels.astype(int) - 100).max()) <= 2
    return [Finding("JPEG codec", "ok" if is_right else "broken", "round trip of a grey image", _INSTALL, True)]


def _try_in_child(subject: str, code: str, expected: str, fix: str, *, is_required: bool = False) -> Finding:
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(subject, "broken", f"no answer within {_CHILD_TIMEOUT_S} s", fix, is_required)
    lines = child.stdout.split()
    if child.returncode == 0 and lines and lines[-1] == expected:
        return Finding(subject, "ok", "works", is_required=is_required)
    last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    return Finding(subject, "broken", last, fix, is_required)


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _check_machine,
    _check_packages_together,
    _check_versions,
    _check_accelerators,
    _check_cpu_arithmetic,
    _check_collectives,
    _check_deepspeed,
    _check_search,
    _check_onnx_runtime,
    _check_tensorrt,
    _check_jpeg,
)
