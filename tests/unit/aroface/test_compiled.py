"""`engine.compile`: the same training as eager, no trace of the rehearsal, and a way back where the compiler fails."""

import copy
import logging

import pytest
import torch
from torch import nn

from aroface.alignment import frozen_statistics
from aroface.config.schema import TrainConfig
from aroface.engine.compiled import compile_in_place, untouched, warm_up
from aroface.engine.deepspeed_settings import deepspeed_settings
from aroface.engine.trainer import Trainer
from aroface.errors import ConfigError
from aroface.models.iresnet import IBasicBlock
from tests.helpers.checkpoints import tiny_config
from tests.helpers.training import ADAFACE, BATCH, DrawnData, config_of, train

FP32 = "engine.precision=fp32"


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("engine", {"zero_stage": 3}, "does not go with engine.zero_stage = 3.*use stage 0, 1 or 2"),
        ("model", {"checkpoint_activations": True}, "does not go with model.checkpoint_activations"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(section, changes, message):
    values = tiny_config().model_dump(mode="json")
    values["engine"]["compile"] = True
    deepspeed_settings(TrainConfig.model_validate(values), 1)
    values[section] |= changes
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(TrainConfig.model_validate(values), 1)


def test_a_failing_rehearsal_is_told_once_and_leaves_the_module_eager(caplog):
    module = nn.Linear(2, 2)
    compile_in_place(module)

    def rehearse():
        raise RuntimeError("no C++\ncompiler")

    with caplog.at_level(logging.INFO):
        assert not warm_up(module, rehearse, is_told=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "RuntimeError: no C++ compiler" in warnings[0]
    assert "engine.compile: false" in warnings[0]
    x = torch.randn(3, 2)
    assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_untouched_restores_statistics_and_draws():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with untouched(module):
        module(torch.randn(8, 3))
        assert not torch.equal(module[0].running_mean, before["0.running_mean"])
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "alignment",
    [
        "{kind: adversarial, share: 0.5, consistency_weight: 1.0}",
        "{kind: delayed, share: 0.25}",
        "{kind: best_of, share: 0.5, candidates: 2}",
        "{kind: adversarial, share: 0.5, release_compat: true}",
    ],
)
def test_a_rehearsal_changes_nothing(tmp_path, alignment):
    config = config_of(ADAFACE, f"alignment={alignment}", "model.dropout=0.3")
    trainer = Trainer(config, DrawnData(), tmp_path / "run", resume="never")
    trainer._engine.train()
    modules = (trainer._engine.module, trainer._head)
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    state = torch.get_rng_state()
    trainer._task.rehearse(BATCH, range(2))
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer._task.state_tensors() == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_is_eager_within_rounding_and_nothing_is_compiled_late(tmp_path, monkeypatch):
    """Six steps with the attack. fp32 sums in another order: 2e-5 of the loss, as between numbers of ranks.

    With running statistics, as there: normalising twelve images by themselves magnifies rounding from step to step.
    """
    from torch._dynamo.utils import counters

    frozen = "engine.batch_norm=frozen"
    eager = train(tmp_path / "eager", FP32, frozen)
    torch._dynamo.reset()
    counters.clear()
    graphs_before_steps = []
    step = Trainer._step

    def counted(self, *args):
        graphs_before_steps.append(counters["stats"]["unique_graphs"])
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", counted)
    compiled = train(tmp_path / "compiled", FP32, frozen, "engine.compile=true")
    assert graphs_before_steps[0] == 2  # the main pass and the attack
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert compiled.losses == pytest.approx(eager.losses, rel=2e-5)
    assert compiled.grad_norms == pytest.approx(eager.grad_norms, rel=1e-3)
    for name, value in eager.tensors.items():
        torch.testing.assert_close(
            compiled.tensors[name], value, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_block_normalises_and_records_as_the_eager_one(precision):
    """Values, gradients and running statistics of a block in training mode, in the attack's state too.

    fp32: sums in another order. bf16: the compiler keeps what eager rounds between two operations, 8 bits each.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = IBasicBlock(8, 8, 2).train()
    compiled = copy.deepcopy(eager)
    compile_in_place(compiled)
    images = torch.randn(6, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    found = [outcome(block, images, precision) for block in (compiled, eager)]
    share = 1e-4 if precision == "fp32" else 0.03
    for ours, wanted in zip(*found, strict=True):
        assert (ours.double() - wanted.double()).abs().max() <= share * wanted.double().abs().max()


def outcome(block, images, precision):
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = block(x)
        with frozen_statistics(block, "batch"):
            attacked = block(x)
    upstream = torch.linspace(-1, 1, value.numel()).view_as(value)
    (value * upstream + attacked * upstream.sin()).sum().backward()
    return value.detach(), attacked.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_cxx_compiler_training_is_the_eager_one(tmp_path, caplog):
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    eager = train(tmp_path / "eager", FP32)
    torch._dynamo.reset()
    with fresh_cache(), inductor.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level(logging.INFO):
        fallen = train(tmp_path / "fallen", FP32, "engine.compile=true")
    warnings = [
        r.getMessage() for r in caplog.records if r.name == "aroface.engine.compiled" and r.levelname == "WARNING"
    ]
    assert len(warnings) == 1
    assert "could not be compiled" in warnings[0]
    assert fallen.losses == eager.losses
    assert all(torch.equal(fallen.tensors[name], value) for name, value in eager.tensors.items())
