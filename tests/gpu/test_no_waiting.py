"""Between log steps the host does not wait for the device: it launches the next step while the device runs this one."""

import functools

import pytest
import torch

from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.engine.joint_update import JointUpdate
from aroface.engine.task import FaceTask
from tests.helpers.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

#: Steps in which libraries set themselves up, graphs are recorded and constants are sent.
SETTLED = 2
SETTINGS = ("batch.global_batch=8", "log.every_steps=100", "checkpoint.every_steps=100")


@pytest.fixture
def watched(monkeypatch):
    """Calls of a step that were made without waiting: PyTorch raises where one would."""
    calls = []
    seen = dict.fromkeys(("task", "backward", "update"), 0)

    def watch(name, owner, method):
        original = getattr(owner, method)

        @functools.wraps(original)
        def call(*args, **kwargs):
            seen[name] += 1
            if seen[name] <= SETTLED:
                return original(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            calls.append(name)
            return found

        monkeypatch.setattr(owner, method, call)

    watch("task", FaceTask, "__call__")
    watch("backward", BackboneEngine, "backward")
    watch("update", JointUpdate, "__call__")
    return calls


@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize(
    "alignment",
    [
        "{kind: none}",
        "{kind: random, share: 0.5}",
        "{kind: adversarial, share: 0.5, consistency_weight: 1.0}",
        "{kind: adversarial, share: 0.5, batch_statistics: batch, steps: 2}",
        "{kind: best_of, share: 0.5, candidates: 2}",
        "{kind: elastic, share: 0.5}",
        "{kind: delayed, share: 0.5}",
    ],
)
def test_alignments(tmp_path, watched, alignment, graphs):
    """`release_compat` draws on the host, as the published code does."""
    augment = "data.augment={flip: 0.5, crop: 0.5, low_resolution: 0.5, photometric: 0.5}"
    train(tmp_path / "run", *SETTINGS, f"alignment={alignment}", f"engine.cuda_graphs={graphs}", augment)
    _assert_watched(watched)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize(
    "head",
    [
        "kind: arcface, margin: 0.3",
        "kind: cosface, margin: 0.3",
        "kind: combined, m1: 1.0, m2: 0.3, m3: 0.2",
        "kind: adaface, margin: 0.3",
        "kind: curricularface, margin: 0.3",
        "kind: magface",
        "kind: arcface, margin: 0.3, interclass_filter: 0.4",
        "kind: arcface, margin: 0.3, sample_rate: 0.7",
    ],
)
def test_heads(tmp_path, watched, head, implementation):
    if implementation == "triton" and ("curricular" in head or "filter" in head):
        pytest.skip("the fused kernels leave the negatives as they are")
    values = f"head={{{head}, logit_scale: 16.0, logit_precision: bf16, implementation: {implementation}}}"
    train(tmp_path / "run", *SETTINGS, values)
    _assert_watched(watched)


@pytest.mark.parametrize("settings", [("engine.zero_stage=0",), ("engine.zero_stage=2",), ("optim.clip_norm=1.0",)])
def test_engines(tmp_path, watched, settings):
    train(tmp_path / "run", *SETTINGS, "batch.micro_batch=4", *settings)
    _assert_watched(watched)


def _assert_watched(calls):
    assert {name: calls.count(name) > 2 for name in ("task", "backward", "update")} == dict.fromkeys(
        ("task", "backward", "update"), True
    )
