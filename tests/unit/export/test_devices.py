"""The GPU of a rank, and that every runtime takes it. A stand-in for PyTorch counts the GPUs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

import export.tensorrt_probe
import export.tensorrt_runtime
import export.to_tensorrt
from aroface.devices import own_device, own_gpu
from export.engine_record import BatchProfile
from export.metadata import ModelMetadata
from export.runtime import OnnxEmbedder
from export.tensorrt_runtime import TensorRtEmbedder
from export.to_tensorrt import EngineSettings, build_plan
from tests.helpers import tensorrt_stand_in as stand_in

Start = Callable[..., None]

RANKS = pytest.mark.parametrize(
    ("ranks", "gpu"),
    [({}, 0), ({"LOCAL_RANK": "3"}, 3), ({"SLURM_LOCALID": "5"}, 1), ({"LOCAL_RANK": ""}, 0), ({"LOCAL_RANK": "4"}, 0)],
)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Be a rank on a machine with four GPUs."""

    def as_rank(ranks: dict[str, str], gpus: int = 4) -> None:
        for name in ("LOCAL_RANK", "SLURM_LOCALID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ranks.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return as_rank


@RANKS
def test_a_rank_takes_the_gpu_of_its_number(start: Start, ranks: dict[str, str], gpu: int) -> None:
    start(ranks)
    assert (own_gpu(), own_device()) == (gpu, f"cuda:{gpu}")
    start(ranks, gpus=1)  # srun shows every task its own
    assert own_device() == "cuda:0"
    start(ranks, gpus=0)
    assert (own_gpu(), own_device()) == (None, "cpu")


class Loaded(Exception):  # noqa: N818 - a way out, no error
    """Carries what ONNX Runtime was asked for."""


@RANKS
@pytest.mark.parametrize("has_cuda", [True, False])
def test_onnx_runtime_takes_it_too(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ranks: dict[str, str],
    gpu: int,
    has_cuda: bool,
) -> None:
    start(ranks)
    asked: list[Any] = []

    def session(path: str, options: object, *, providers: list[Any], **_: object) -> object:
        asked.extend(providers)
        return SimpleNamespace(get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={}))

    def stop(*_: object, **__: object) -> None:
        raise Loaded

    available = [*(["TensorrtExecutionProvider", "CUDAExecutionProvider"] if has_cuda else []), "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(ModelMetadata, "from_props", stop)
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(Loaded):
        OnnxEmbedder(tmp_path / "m.onnx")
    cuda = [("CUDAExecutionProvider", {"device_id": gpu})] if has_cuda else []
    assert asked == [*cuda, "CPUExecutionProvider"]


@RANKS
def test_the_stream_of_tensorrt_is_on_it_and_so_is_the_probe(
    start: Start, monkeypatch: pytest.MonkeyPatch, ranks: dict[str, str], gpu: int
) -> None:
    start(ranks)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7, device=device))
    stream = export.tensorrt_runtime.new_stream()
    assert stream.device == torch.device("cuda", gpu)
    assert stream._stream.device == stream.device
    commands: list[list[str]] = []
    monkeypatch.setattr(
        export.tensorrt_probe.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace()
    )
    export.tensorrt_probe._probe()
    assert commands[0][-1] == str(gpu)


def test_an_engine_is_loaded_and_run_while_its_gpu_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"inside": False}
    seen: list[tuple[str, bool]] = []

    class Stream(stand_in.Stream):
        def __enter__(self) -> "Stream":
            state["inside"] = True
            return self

        def __exit__(self, *error: object) -> None:
            state["inside"] = False

    class Engine:
        def create_execution_context(self) -> None:
            seen.append(("context", state["inside"]))

    def load(runtime: object, plan: bytes) -> Engine:
        seen.append(("load", state["inside"]))
        return Engine()

    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(stand_in.Runtime, "deserialize_cuda_engine", load)
    monkeypatch.setattr(export.tensorrt_runtime, "new_stream", Stream)
    model = SimpleNamespace(contract=None)
    record = SimpleNamespace(profiles=(BatchProfile.parse("1,2,4"),), model=model)
    embedder = TensorRtEmbedder(b"", record, name="e")  # type: ignore[arg-type]
    with pytest.raises(export.tensorrt_runtime.ExportError, match="too little memory"):
        embedder._run(torch.zeros(1, 4).numpy())
    assert seen == [("load", True), ("context", True)]


@RANKS
def test_an_engine_is_built_while_its_gpu_is_the_current_one(
    start: Start, monkeypatch: pytest.MonkeyPatch, ranks: dict[str, str], gpu: int
) -> None:
    start(ranks)
    current: list[int | None] = [None]
    seen: list[tuple[str, int | None]] = []

    class Guard:
        def __init__(self, stream: Any) -> None:
            self._index = stream.device.index

        def __enter__(self) -> None:
            current[0] = self._index

        def __exit__(self, *error: object) -> None:
            current[0] = None

    class Builder(stand_in.Builder):
        def __init__(self, logger: stand_in.ILogger) -> None:
            seen.append(("builder", current[0]))
            super().__init__(logger)

        def build_serialized_network(self, network: Any, config: Any) -> stand_in.IHostMemory:
            seen.append(("build", current[0]))
            return stand_in.IHostMemory(b"plan")

    class Parser:
        def __init__(self, *_: object) -> None: ...

        def parse(self, model: bytes) -> bool:
            return True

    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(stand_in, "Builder", Builder)
    monkeypatch.setattr(stand_in, "OnnxParser", Parser)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "stream", Guard)
    metadata = SimpleNamespace(image_size=112, input_layout="uint8_nhwc", input_name="faces")
    assert build_plan(b"", metadata, EngineSettings()) == b"plan"  # type: ignore[arg-type]
    assert seen == [("builder", gpu), ("build", gpu)]
    assert current == [None]
