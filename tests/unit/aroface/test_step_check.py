"""A step whose loss or gradient is not finite changes nothing, though the host learns of it a step later."""

import pytest
import torch

from aroface.engine.trainer import Trainer
from aroface.errors import ArofaceError
from tests.helpers.training import DrawnData, config_of


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("every", [1, 100])
def test_nothing_is_updated_and_the_step_is_named(tmp_path, stage, every):
    settings = (f"engine.zero_stage={stage}", f"log.every_steps={every}", "checkpoint.every_steps=100")
    trainer = Trainer(config_of(*settings), DrawnData(), tmp_path / "run", resume="auto")
    kept, told = {}, []
    update, describe = trainer._update, trainer._data.describe
    trainer._data.describe = lambda sample: told.append(sample) or describe(sample)

    def poisoned(losses, lr):
        step = trainer.position.step
        if step == 2:
            trainer._head.weight.grad.view(-1)[0] = torch.nan
            kept["before"] = state(trainer)
        report = update(losses, lr)
        if step == 2:
            kept["after"] = state(trainer)
            kept["samples"] = trainer._data.delivered[-1][:8]
        return report

    trainer._update = poisoned
    with pytest.raises(ArofaceError, match=r"Step 3: the gradient of the class centres is not finite .* on rank 0"):
        trainer.train()
    assert told == kept["samples"]
    assert all(torch.equal(a, b) for a, b in zip(kept["before"], kept["after"], strict=True))
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.parametrize(
    ("every", "precision", "told"),
    [
        (1, "bf16", r"the newest checkpoint is good\..* schedule\.warmup_epochs, or set engine\.precision: fp32\.$"),
        (
            100,
            "fp32",
            r"run has no checkpoint yet\..* lower optim\.lr_per_1024, or lengthen schedule\.warmup_epochs\.$",
        ),
    ],
)
def test_the_advice_is_true_of_this_run(tmp_path, every, precision, told):
    saves = f"checkpoint={{every_steps: {every}, background: false}}"
    config = config_of(saves, f"engine.precision={precision}")
    trainer = Trainer(config, DrawnData(), tmp_path / "run", resume="auto")
    update = trainer._update

    def poisoned(losses, lr):
        if trainer.position.step == 1:
            losses = losses * torch.nan
        return update(losses, lr)

    trainer._update = poisoned
    with pytest.raises(ArofaceError, match=told):
        trainer.train()


def state(trainer):
    """Weights and momenta of both."""
    engine = trainer._engine
    weights, momenta = engine.weights(settle=False), engine.momentum()
    head = trainer._head.weight.detach().clone(), trainer._head_optimizer.momentum_buffer.clone()
    return [*weights.values(), *momenta.values(), *head]
