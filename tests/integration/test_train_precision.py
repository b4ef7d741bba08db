"""fp16 with loss scaling on a real engine, and gradients that are not finite, at every ZeRO stage."""

import pytest
import torch
from safetensors.torch import load_file

from aroface.engine.deepspeed_engine import BackboneEngine
from aroface.errors import ArofaceError
from tests.helpers.training import COMPARABLE, PARTITIONED, config_of, train

FP16 = (*COMPARABLE, PARTITIONED, "engine.precision=fp16")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_skips_backbone_and_head_and_training_goes_on(tmp_path, stage):
    run = tmp_path / "run"
    settings = (*FP16, f"engine.zero_stage={stage}", "checkpoint.every_steps=1", "optim.lr_per_1024=0.5")
    trained = train(run, *settings, "engine.loss_scale={initial: 1e38, window: 1000}", stop_after=2)
    first, second = (
        [load_file(path) for path in sorted((run / name).glob("*.safetensors")) if "model" not in path.name]
        for name in ("step-00000001", "step-00000002")
    )
    # the statistics of the head's norms aside, nothing has moved
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a if "norm_" not in k)
    assert not any(value.any() for value in first[2].values()), "the momentum is zero"
    assert trained.grad_norms == [None, None]


def test_the_scale_falls_until_steps_are_taken(tmp_path):
    norms = train(tmp_path / "run", *FP16, "engine.loss_scale={initial: 262144}", "optim.lr_per_1024=0.5").grad_norms
    assert norms[0] is None
    assert norms[-1] is not None


@pytest.mark.parametrize("stage", [0, 3])
def test_fp16_follows_fp32(tmp_path, stage):
    mild = ("optim.lr_per_1024=0.5", f"engine.zero_stage={stage}")
    plain = train(tmp_path / "plain", *COMPARABLE, *mild)
    half = train(tmp_path / "half", *FP16, *mild, "engine.loss_scale={initial: 1024, window: 3}")
    assert half.losses == pytest.approx(plain.losses, rel=1e-2)
    assert half.grad_norms == pytest.approx(plain.grad_norms, rel=5e-2)


def test_the_loss_scale_is_resumed(tmp_path):
    settings = (*FP16, "engine.loss_scale={initial: 64, window: 2}")
    whole = train(tmp_path / "whole", *settings)
    train(tmp_path / "halves", *settings, stop_after=3)
    halves = train(tmp_path / "halves", *settings)
    assert halves.losses == whole.losses
    assert [k for k, v in whole.tensors.items() if not torch.equal(v, halves.tensors[k])] == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_not_skipped_in_silence(tmp_path, monkeypatch, stage):
    """DeepSpeed by itself skips it at stages 1 to 3, and the head would have been stepped alone."""
    original = BackboneEngine.backward

    def backward(self, loss):
        original(self, loss)
        self.gradients()[0].view(-1)[0] = torch.inf

    monkeypatch.setattr(BackboneEngine, "backward", backward)
    with pytest.raises(ArofaceError, match=r"Step 1: the gradient of the backbone is not finite .* drawn: 00"):
        train(tmp_path / "run", *COMPARABLE, PARTITIONED, f"engine.zero_stage={stage}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_synchronised_batch_norm_needs_gpus(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ArofaceError, match=r"engine.batch_norm = sync needs GPUs.*Set local, or frozen"):
        train(tmp_path / "run", "engine.batch_norm=sync")


def test_offloading_is_refused(tmp_path):
    extra = "engine.deepspeed_extra={zero_optimization: {offload_optimizer: {device: cpu}}}"
    with pytest.raises(ArofaceError, match=r"offload_optimizer is not supported: gradients are checked"):
        train(tmp_path / "run", extra)


def test_clipping_over_backbone_and_head_is_that_of_torch(tmp_path):
    """A plain loop of torch.optim.SGD and clip_grad_norm_ over all parameters."""
    from aroface.engine.schedule import learning_rate
    from aroface.engine.seeding import derive_seed
    from aroface.engine.task import contract_of
    from aroface.heads import build_head
    from aroface.models import build_backbone
    from aroface.preprocess import normalise
    from tests.helpers.training import BATCH, CLASSES, SAMPLES, DrawnData

    settings = (*COMPARABLE, "optim.clip_scope=joint", "optim.clip_norm=2.0", "optim.lr_per_1024=1.0")
    engine = train(tmp_path / "run", *settings)
    config = config_of(*settings)
    torch.manual_seed(derive_seed(config.seed, "backbone weights"))
    backbone = build_backbone(config.model).eval()  # frozen batch norm
    head = build_head(config.head, num_classes=CLASSES, embedding_dim=8, seed=config.seed)
    parameters = [*(p for p in backbone.parameters() if p.requires_grad), head.weight]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)
    losses, norms = [], []
    batches = DrawnData().batches(seed=3, start_position=0, num_batches=6, batch_size=BATCH, rank=0, world_size=1)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, num_samples=SAMPLES)
        loss = head(backbone(normalise(batch.images, contract_of(config))), batch.labels, step=step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 2.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(norms) > 2.0, "every step was clipped"
    # fp32 rounding over six steps
    assert engine.losses == pytest.approx(losses, rel=1e-4)
    assert engine.grad_norms == pytest.approx(norms, rel=1e-3)
    torch.testing.assert_close(engine.tensors["head/weight"], head.weight.detach(), rtol=1e-3, atol=1e-5)
