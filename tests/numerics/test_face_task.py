"""The training step up to the loss: the consistency term, and an attack that leaves head and data order alone."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aroface.config import TrainConfig
from aroface.engine.task import FaceTask
from aroface.errors import ConfigError
from aroface.heads import build_head
from aroface.types import Batch
from tests.helpers.checkpoints import tiny_config


class PlainEngine:
    """What the task uses of the engine."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 16))
        self.seen = []
        self.scaler = SimpleNamespace(scale=1.0)

    def autocast(self):
        return contextlib.nullcontext()

    def beside(self, images):
        return self.module(images)

    def __call__(self, images):
        self.seen.append(images)
        return self.module(images)


def config(**alignment):
    values = tiny_config().model_dump(mode="json")
    values["alignment"] = {"kind": "random", "share": 0.5, **alignment}
    values["engine"] = {"precision": "fp32"}
    values["head"] = {"kind": "adaface", "margin": 0.4, "logit_scale": 16.0}
    values["data"] |= {"augment": {"flip": 0.5}}
    return TrainConfig.model_validate(values)


def build(settings):
    engine = PlainEngine()
    head = build_head(settings.head, num_classes=5, embedding_dim=16, seed=0)
    return FaceTask(settings, engine, head, device=torch.device("cpu"), rank=0), engine, head


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), torch.arange(8))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_consistency_adds_its_weight_times_one_minus_cosine(statistics):
    plain = build(config(batch_statistics=statistics))
    task = build(config(consistency_weight=0.7, batch_statistics=statistics))
    losses = [float(part[0](batch(), step=0, micro_step=3).loss.detach()) for part in (plain, task)]
    warped = task[1].seen[0]
    assert torch.equal(plain[1].seen[0], warped)
    clean, engine, _ = build(config(kind="none"))
    clean(batch(), step=0, micro_step=3)
    originals = engine.seen[0]
    rows = [i for i in range(8) if not torch.equal(originals[i], warped[i])]
    assert len(rows) == 4
    engine = PlainEngine()  # statistics as they were before the step
    with torch.no_grad():
        embeddings = engine.module(warped)[rows].double()
        fresh = PlainEngine().module.train(statistics == "batch")
        target = fresh(originals[rows]).double()
    cosines = nn.functional.cosine_similarity(embeddings, target)
    assert losses[1] - losses[0] == pytest.approx(0.7 * float((1 - cosines).mean()), abs=1e-5)


def test_gradient_of_the_consistency_term_goes_through_the_warped_images_alone():
    task, engine, _ = build(config(consistency_weight=1.0, kind="adversarial"))
    clean = task._clean_embeddings(torch.randn(4, 3, 32, 32), 0)
    assert not clean.requires_grad
    task(batch(), step=0, micro_step=0).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in engine.module.parameters())


@pytest.mark.parametrize("kind", ["adversarial", "best_of", "elastic"])
def test_attack_uses_running_averages_once_they_have_settled(kind):
    def seen(step, statistics):
        task, engine, _ = build(config(kind=kind, batch_statistics=statistics, consistency_weight=1.0))
        norm = engine.module[1]
        norm.running_var.fill_(0.1)
        norm.running_mean.copy_(torch.randn(len(norm.running_mean), generator=torch.Generator().manual_seed(1)))
        loss = task(batch(), step=step, micro_step=3).loss
        return torch.cat([engine.seen[0].flatten(), loss.detach()[None]])

    for step, same, other in ((0, "batch", "running"), (99, "batch", "running"), (100, "running", "batch")):
        found = seen(step, "auto")
        assert torch.equal(found, seen(step, same))
        assert not torch.equal(found, seen(step, other))


@pytest.mark.parametrize(
    "alignment",
    [
        {"kind": "adversarial", "steps": 2},
        {"kind": "adversarial", "batch_statistics": "running"},
        {"kind": "best_of"},
        {"kind": "elastic", "consistency_weight": 1.0},
    ],
)
def test_attack_leaves_head_statistics_gradients_and_other_draws_alone(alignment):
    """After one step everything but the images is as without the attack: one update each, from the main pass."""
    task, engine, head = build(config(**alignment))
    images, labels = torch.randn(8, 3, 32, 32), batch().labels
    random_state = torch.get_rng_state()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with torch.no_grad():
        task._align(images, labels, step=0, micro_step=0)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert int(engine.module[1].num_batches_tracked) == 0
    assert all(p.grad is None for p in [*engine.module.parameters(), head.weight])
    assert torch.equal(torch.get_rng_state(), random_state)
    task(batch(), step=0, micro_step=0)
    assert int(engine.module[1].num_batches_tracked) == 1


def test_published_attack_updates_the_statistics_a_second_time():
    task, engine, _ = build(config(kind="adversarial", release_compat=True))
    task(batch(), step=0, micro_step=0)
    assert int(engine.module[1].num_batches_tracked) == 2


def test_augmentation_draws_the_same_whatever_the_attack():
    seen = []
    for kind in ("none", "adversarial", "best_of"):
        task, engine, _ = build(config(kind=kind, share=0.25))
        task(batch(), step=0, micro_step=5)
        seen.append(engine.seen[0])
    for other in seen[1:]:
        assert sum(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True)) == 6


@pytest.mark.parametrize("alignment", [{"kind": "random"}, {"kind": "adversarial"}])
def test_every_seed_rank_and_micro_step_draws_its_own_and_the_same_again(alignment):
    def images_of(seed, rank, micro_step):
        settings = config(**alignment).model_copy(update={"seed": seed})
        head = build_head(settings.head, num_classes=5, embedding_dim=16, seed=0)
        task = FaceTask(settings, PlainEngine(), head, device=torch.device("cpu"), rank=rank)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        return task._align(images, batch().labels, step=0, micro_step=micro_step).images

    triples = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [images_of(*triple) for triple in triples]
    for triple, first in zip(triples, drawn, strict=True):
        assert torch.equal(images_of(*triple), first)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_ranks_and_steps_draw_other_images():
    settings = config(share=0.25)
    places = set()
    for rank, micro_step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        engine = PlainEngine()
        head = build_head(settings.head, num_classes=5, embedding_dim=16, seed=0)
        task = FaceTask(settings, engine, head, device=torch.device("cpu"), rank=rank)
        images = torch.zeros(8, 3, 32, 32)
        mixed = task._align(images, torch.zeros(8, dtype=torch.int64), step=0, micro_step=micro_step)
        places.add(tuple(mixed.warped.tolist()))
    assert len(places) > 1


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        ({"share": 0.01}, "is no image; raise alignment.share or batch.micro_batch"),
        ({"kind": "adversarial", "share": 0.1}, "set alignment.batch_statistics: running"),
        ({"share": 0.1, "consistency_weight": 1.0}, "is one image, which has no batch statistics"),
        ({"kind": "adversarial", "share": 0.3, "release_compat": True}, "makes 5 + 2 of 8 images"),
    ],
)
def test_shares_that_leave_too_few_images_are_named(alignment, message):
    with pytest.raises(ConfigError) as error:
        build(config(**alignment))
    assert message in str(error.value)


def test_published_attack_draws_the_same_on_every_rank_and_ours_does_not():
    for alignment, is_same in (
        ({"kind": "adversarial", "release_compat": True}, True),
        ({"kind": "adversarial"}, False),
    ):
        settings = config(**alignment)
        seen = []
        for rank in (0, 1):
            engine = PlainEngine()
            head = build_head(settings.head, num_classes=5, embedding_dim=16, seed=0)
            task = FaceTask(settings, engine, head, device=torch.device("cpu"), rank=rank)
            images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
            seen.append(task._align(images, batch().labels, step=0, micro_step=0).images)
        assert torch.equal(*seen) is is_same
