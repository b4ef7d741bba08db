"""Engines by the real TensorRT, and ONNX Runtime on CUDA: the same embeddings as the checkpoint."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from aroface.inference import TorchEmbedder
from export.accuracy import AccuracyGate
from export.engine_record import BatchProfile
from export.metadata import Precision
from export.parity import check_parity, synthetic_faces
from export.runtime import OnnxEmbedder
from export.tensorrt_probe import require_tensorrt
from export.tensorrt_runtime import open_engine
from export.to_onnx import OnnxSettings, make_onnx
from export.to_tensorrt import EngineSettings, export_tensorrt, opset_for
from tests.helpers.checkpoints import IMAGE_SIZE, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FACES = synthetic_faces(IMAGE_SIZE)
PROFILES = (BatchProfile.parse("1,1,8"), BatchProfile.parse("2,16,32"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_engine_gives_the_embeddings_of_the_checkpoint(tmp_path: Path, precision: Precision) -> None:
    pytest.importorskip("tensorrt")
    model = tiny_model("bgr")
    path, cache = tmp_path / "model.engine", tmp_path / "timing.cache"
    opset = opset_for(require_tensorrt().tensorrt_release, precision)
    proto = make_onnx(model, OnnxSettings(precision=precision, quantisation="tensorrt", opset_version=opset), FACES)
    gate = AccuracyGate(lambda embedder: {"rank_1": 0.5}, "none") if precision == "int8" else None
    settings = EngineSettings(PROFILES, timing_cache=cache)
    reference = TorchEmbedder(tiny_model("bgr"), device="cpu")
    done = export_tensorrt(proto, path, reference, FACES, settings, gate=gate)
    assert done.record.device == torch.cuda.get_device_name(0)
    assert cache.stat().st_size > 0
    engine = open_engine(path)
    assert check_parity(reference, engine, FACES).min_cosine == pytest.approx(done.parity.min_cosine, abs=1e-6)
    whole = engine.embed(FACES)
    for size in (1, 2, 8, 9, 32, 33):
        np.testing.assert_allclose(engine.embed(FACES[:size]), whole[:size], rtol=0.1, atol=0.2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtime_on_cuda(tmp_path: Path, precision: Precision) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has no CUDA")
    path = tmp_path / "model.onnx"
    path.write_bytes(make_onnx(tiny_model(), OnnxSettings(precision=precision)).SerializeToString())
    check_parity(TorchEmbedder(tiny_model(), device="cpu"), OnnxEmbedder(path), FACES)
