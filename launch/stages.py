"""Chains of public commands, each in a process of its own, and a record of what they took."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from aroface import __version__
from aroface.errors import ArofaceError
from aroface.files import write_json

__all__ = ["Stage", "StageFailedError", "StageRecord", "hardware", "package_versions", "run_stages"]

_PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "onnx",
    "onnxruntime",
    "webdataset",
    "opencv-python-headless",
)
_KIB_PER_GIB = 2**20


class StageFailedError(ArofaceError):
    """One of the commands ended with an error, which it has printed itself."""


@dataclass(frozen=True)
class Stage:
    """One public command of the chain."""

    name: str  #: shown as a heading and in the report
    arguments: tuple[str, ...]  #: what follows `aroface` on the command line

    @property
    def command(self) -> str:
        """The line that a user would type."""
        return shlex.join(["aroface", *self.arguments])


@dataclass(frozen=True)
class StageRecord:
    """What a stage took."""

    name: str
    command: str
    seconds: float  #: wall time
    cpu_seconds: float  #: user and system time of all its processes
    peak_memory_gib: float  #: largest resident size of its process


def run_stages(stages: Sequence[Stage], *, record_path: Path, say: Callable[[str], None]) -> list[StageRecord]:
    """Run the commands one after the other, each in a process of its own, and keep `record_path` up to date.

    Raises:
        StageFailedError: a command exited with anything but 0; the later ones are not run.
    """
    records: list[StageRecord] = []
    for number, stage in enumerate(stages, start=1):
        say(f"\n[{number}/{len(stages)}] {stage.name}\n$ {stage.command}")
        records.append(_run(stage))
        write_json(
            record_path,
            {"stages": [asdict(r) for r in records], "hardware": hardware(), "versions": package_versions()},
        )
    return records


def _run(stage: Stage) -> StageRecord:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "launch", *stage.arguments], env=_environment())
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.wait()
        raise
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code != 0:
        reason = "its message stands above" if code > 0 else f"signal {-code}"
        raise StageFailedError(f"stage {stage.name!r} ended with exit code {code} ({reason}): {stage.command}")
    return StageRecord(
        name=stage.name,
        command=stage.command,
        seconds=round(time.perf_counter() - started, 2),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 2),
        peak_memory_gib=round(usage.ru_maxrss / _KIB_PER_GIB, 3),
    )


def _environment() -> dict[str, str]:
    """The stages must find the same five packages, from a bare checkout too."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def package_versions() -> dict[str, str]:
    """Versions of aroface, Python and the packages that shape the result; absent ones are left out."""
    found = {"aroface": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """Processor, cores, memory and GPUs, as text for a report."""
    found = {"system": platform.platform(), "cpu": _cpu_name(), "cores": str(len(os.sched_getaffinity(0)))}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found["memory"] = f"{pages / 2**30:.1f} GiB"
    found["gpu"] = _gpu_names() or "none"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu_names() -> str:
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(line.strip() for line in result.stdout.splitlines())
