"""The joint update of backbone and class centres: unscaling, clipping, skipping, and the loss scale itself."""

import math

import pytest
import torch

from aroface.config.engine import EngineConfig, LossScaleConfig
from aroface.config.schema import ArcFaceConfig, OptimConfig
from aroface.engine.joint_update import Gate, JointUpdate, NonFiniteError
from aroface.engine.loss_scale import LossScaler
from aroface.engine.watchdog import Watchdog
from aroface.errors import ArofaceError
from aroface.heads import HeadSGD, build_head

LOSSES = torch.tensor([1.0, 2.0])


class FakeEngine:
    """Holds a gradient as the engine would, and tells what it was asked."""

    replicas = 1

    def __init__(self, *gradients: torch.Tensor) -> None:
        self.parts = list(gradients)
        self.calls: list[str] = []

    def gradients(self) -> list[torch.Tensor]:
        return self.parts

    def step(self, lr: float, gate: Gate | None = None) -> None:
        self.calls.append(f"step {lr}" if gate is None or not gate.is_shut else "shut")
        if gate is not None and gate.divisor is not None:
            self.parts = [part / gate.divisor for part in self.parts]

    def skip(self) -> None:
        self.calls.append("skip")


def scaler_of(precision: str = "fp16", **limits: float) -> LossScaler:
    return LossScaler(EngineConfig(precision=precision, loss_scale=LossScaleConfig.model_validate(limits)))


def make(gradient: torch.Tensor, head_gradient: torch.Tensor, scaler: LossScaler, **optim: object):
    head = build_head(ArcFaceConfig(kind="arcface", margin=0.5), num_classes=3, embedding_dim=4, seed=0)
    head.weight.grad = head_gradient.clone()
    optimizer = HeadSGD(head, momentum=0.0, weight_decay=0.0)
    engine = FakeEngine(gradient.clone())
    return JointUpdate(engine, head, optimizer, OptimConfig.model_validate(optim), scaler), engine, head


@pytest.fixture
def gradients() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, generator=generator), torch.randn(3, 4, generator=generator)


@pytest.mark.parametrize("scope", ["backbone", "joint"])
@pytest.mark.parametrize("clip_norm", [None, 0.5, 1000.0])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_gradients_are_unscaled_and_clipped_as_torch_does(gradients, scope, clip_norm, precision):
    scaler = scaler_of(precision, initial=1024.0)
    update, engine, head = make(*(g * scaler.scale for g in gradients), scaler, clip_norm=clip_norm, clip_scope=scope)
    before = head.weight.detach().clone()
    report = update(LOSSES, 0.1)
    plain = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(plain, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(plain if scope == "joint" else plain[:1], clip_norm or math.inf)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-6)
    torch.testing.assert_close(engine.parts[0], plain[0].grad)
    torch.testing.assert_close(head.weight.detach(), before - 0.1 * plain[1].grad)
    assert engine.calls == ["step 0.1"]
    assert head.weight.grad is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["backbone", "class centres"])
def test_fp16_overflow_of_either_skips_both_and_halves_the_scale(gradients, where, bad):
    backbone, centres = gradients
    (backbone if where == "backbone" else centres).view(-1)[3] = bad
    scaler = scaler_of(initial=64.0)
    update, engine, head = make(backbone, centres, scaler)
    before = head.weight.detach().clone()
    report = update(LOSSES, 0.1)
    assert report.was_skipped
    assert engine.calls == ["skip"]
    assert torch.equal(head.weight.detach(), before)
    assert head.weight.grad is None
    assert scaler.scale == 32.0


@pytest.mark.parametrize("where", ["backbone", "class centres", "loss"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_scale_what_is_not_finite_stops_before_the_update(gradients, where, precision):
    backbone, centres = gradients
    losses = LOSSES.clone()
    {"backbone": backbone, "class centres": centres.view(-1), "loss": losses}[where][0] = math.nan
    update, engine, head = make(backbone, centres, scaler_of(precision))
    before = head.weight.detach().clone()
    report = update(losses, 0.1)
    with pytest.raises(NonFiniteError, match=where):
        report.check()
    assert engine.calls == ["shut"]
    assert torch.equal(head.weight.detach(), before)


def test_a_loss_that_is_not_finite_stops_fp16_too(gradients):
    update, engine, _ = make(*gradients, scaler_of())
    with pytest.raises(NonFiniteError, match="loss"):
        update(torch.tensor([math.nan]), 0.1)
    assert engine.calls == []


def test_large_gradients_are_no_overflow(gradients):
    """Norms are squared in float64: the square of 1e20 is not an fp32 number, a norm of 1e20 is."""
    parts = [torch.full((1,), 1e18) for _ in range(20_000)]
    update, engine, _ = make(gradients[0], gradients[1], scaler_of("fp32"), clip_norm=1.0)
    engine.parts = parts
    report = update(LOSSES, 0.1)
    assert report.grad_norm == pytest.approx(1e18 * math.sqrt(20_000), rel=1e-5)
    assert float(torch.cat(engine.parts).norm()) == pytest.approx(1.0, rel=1e-5)


def test_the_scale_doubles_after_a_quiet_window_and_is_remembered():
    scaler = scaler_of(initial=8.0, window=3)
    for _ in range(2):
        scaler.update(overflowed=False)
    other = scaler_of(initial=1.0, window=3)
    other.load_state(scaler.state())
    for one in (scaler, other):
        assert one.scale == 8.0
        one.update(overflowed=False)
        assert one.scale == 16.0
        one.update(overflowed=True)
        assert one.scale == 8.0


def test_an_overflow_at_the_smallest_scale_is_an_error():
    scaler = scaler_of(initial=2.0, minimum=1.0)
    scaler.update(overflowed=True)
    with pytest.raises(ArofaceError, match="lower optim.lr_per_1024, or set engine.precision: bf16"):
        scaler.update(overflowed=True)


def test_other_precisions_have_no_scale():
    scaler = scaler_of("bf16")
    scaler.update(overflowed=True)
    assert scaler.scale == 1.0
    assert scaler.state() is None


def test_the_watchdog_fires_once_and_only_without_beats(capfd):
    fired = []
    with Watchdog(1.0, on_expiry=lambda: fired.append(1)) as dog:
        for _ in range(10):
            dog.beat()
            torch.empty(1).sum()
        assert fired == []
        dog._thread.join(timeout=30)
    assert fired == [1]
    assert "no step was finished" in capfd.readouterr().err
