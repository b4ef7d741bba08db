import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aroface.config import TrainConfig, parse_config
from aroface.config.alignment import AlignmentConfig
from aroface.heads import build_head
from aroface.models import build_backbone
from aroface.types import Batch
from launch.bench import step
from launch.bench.roofline import Peaks
from launch.bench.step_feed import collectives_s, drawn_shards, fed_steps
from launch.bench.step_limits import StepLimits, limits_of

BATCH, CLASSES = 4, 30
#: so that a limit in seconds is a number of operations
UNIT = Peaks("cpu", 1, "cpu", {"fp32": 1.0}, bytes_per_s=1e30)


def config(**options: object) -> TrainConfig:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    args = ["--width", "0.125", "--image-size", "32", "--batch", str(BATCH), "--precision", "fp32"]
    return step._config(parser.parse_args(args), {"kind": "adversarial", **options})


def alignment(**options: object) -> AlignmentConfig:
    return config(**options).alignment


def test_a_plain_step_is_counted_as_pytorch_counts_it():
    """Forward and backward pass of a real network; head and pixels aside, which are counted by hand."""
    settings = config()
    limits = limits_of(settings, classes=CLASSES, peaks=UNIT)
    backbone = build_backbone(settings.model).train()
    with FlopCounterMode(display=False) as counter:
        embeddings = backbone(torch.randn(BATCH, 3, 32, 32, requires_grad=True))
        embeddings.sum().backward()
    found = limits.step_s(alignment(kind="none")) - 3 * limits.head_flops
    assert found == counter.get_total_flops()
    assert limits.head_flops == 2 * BATCH * CLASSES * settings.model.embedding_dim
    head = build_head(settings.head, num_classes=CLASSES, embedding_dim=settings.model.embedding_dim, seed=0)
    parameters = sum(p.numel() for module in (backbone, head) for p in module.parameters())
    assert limits.parameters == parameters


def test_the_attack_is_counted_as_pytorch_counts_it():
    """All images attacked once: a forward pass, and the gradient of the pixels alone."""
    limits = limits_of(config(), classes=CLASSES, peaks=UNIT)
    backbone = build_backbone(config().model).train().requires_grad_(False)
    pixels = torch.randn(BATCH, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(backbone(2 * pixels).sum(), pixels)  # the counter takes no leaf as the input of a module
    attack = limits.parts_s(alignment(share=1.0))["attack"]
    assert attack - 2 * limits.head_flops == counter.get_total_flops()


def test_each_way_costs_what_its_passes_cost():
    limits = StepLimits(UNIT, 8, 100.0, 10.0, 0, "fp32", "fp32")
    plain = 3 * 100 + 3 * 10
    assert limits.step_s(alignment(kind="none")) == plain
    assert limits.step_s(alignment(kind="random")) == limits.step_s(alignment(kind="delayed")) == plain
    assert limits.step_s(alignment(share=0.25)) == plain + 2 * (200 + 20) / 8
    assert limits.step_s(alignment(share=0.25, steps=3)) == plain + 3 * 2 * (200 + 20) / 8
    assert limits.step_s(alignment(kind="elastic", share=0.25)) == limits.step_s(alignment(share=0.25))
    assert limits.step_s(alignment(kind="best_of", candidates=4, share=0.5)) == plain + 4 * 4 * (100 + 10) / 8
    assert limits.step_s(alignment(share=0.25, release_compat=True)) == plain + 200 + 20


def test_parts_add_up_to_the_step():
    limits = StepLimits(UNIT, 8, 100.0, 10.0, 0, "fp32", "fp32")
    assert sum(limits.parts_s(alignment()).values()) == limits.step_s(alignment())


def test_many_classes_make_a_step_wait_for_memory():
    peaks = Peaks("cpu", 1, "cpu", {"fp32": 1e30}, bytes_per_s=2.0)
    limits = StepLimits(peaks, 8, 100.0, 10.0, 1000, "fp32", "fp32")
    assert limits.step_s(alignment()) == 16 * 1000 / 2
    assert limits.parts_s(alignment())["optimisers"] == 20 * 1000 / 2


class Slow:
    """Data whose batches take three seconds of a clock that is set by hand."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.asked: dict[str, int] = {}

    def batches(self, **asked: int):
        self.asked = asked
        for number in range(asked["num_batches"]):
            self.clock[0] += 3.0
            yield Batch(torch.full((1,), number), torch.zeros(1), torch.zeros(1))


def test_the_wait_is_what_the_loader_takes_between_steps(monkeypatch: pytest.MonkeyPatch):
    clock, seen = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def train(batch: Batch) -> None:
        seen.append(int(batch.images[0]))
        clock[0] += 5.0

    data = Slow(clock)
    wait_s, step_s = fed_steps(data, train, batch=7, steps=4, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert (wait_s, step_s) == (3.0, 8.0)
    assert seen == [0, 1, 2, 3, 4]  # the first is not counted
    assert data.asked["batch_size"] == 7


def test_drawn_shards_are_read_as_the_trainer_reads_its_own():
    with drawn_shards(config(), classes=3) as data:
        asked = {"seed": 0, "start_position": 0, "num_batches": 2, "batch_size": 20, "rank": 0, "world_size": 1}
        batches = list(data.batches(**asked))
    assert all(batch.images.shape == (20, 32, 32, 3) for batch in batches)
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == {0, 1, 2}


def test_work_without_collectives_spends_no_time_in_them():
    assert collectives_s(lambda: torch.ones(3) + 1) == 0.0


def test_the_configuration_of_the_benchmark_is_one_of_the_trainer():
    values = config().model_dump()
    assert parse_config(values, TrainConfig, name="again") == config()
