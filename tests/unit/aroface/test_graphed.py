"""When a pass is recorded, when it is replayed and when neither; a stand-in for graphs runs on the CPU."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from aroface.alignment import frozen_statistics
from aroface.config import alignment
from aroface.config.schema import TrainConfig
from aroface.engine import graphed
from aroface.engine.deepspeed_settings import deepspeed_settings
from aroface.engine.graphed import GraphedPasses
from aroface.errors import ConfigError
from tests.helpers.checkpoints import tiny_config
from tests.helpers.graphs import with_stand_in
from tests.helpers.training import BATCH, train

GRAPHS = "engine.cuda_graphs=true"


@pytest.fixture
def recorder(monkeypatch):
    return with_stand_in(monkeypatch)


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 8)
    return nn.Sequential(*layers).train()


def passes_of(network):
    return GraphedPasses(network, nullcontext)


def drawn(count, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def attack(called, images):
    """Embeddings of a pass, and the gradient of its images."""
    images = images.clone().requires_grad_()
    embeddings = called(images)
    (gradient,) = torch.autograd.grad(embeddings.square().sum(), images)
    return embeddings.detach(), gradient


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_replayed_attack_follows_images_and_weights(recorder, network):
    passes, twin = passes_of(network), copy.deepcopy(network)
    for seed in range(3):
        with frozen_statistics(network, "batch"), frozen_statistics(twin, "batch"):
            assert equal(attack(passes, drawn(5, seed)), attack(twin, drawn(5, seed)))
        with torch.no_grad():
            for parameter in (*network.parameters(), *twin.parameters()):
                parameter.mul_(0.9)
    assert [graph.replays for graph in recorder.graphs] == [3, 3]


def test_a_pass_that_records_statistics_does_so_once_each(recorder, network):
    network[4].eval()
    passes, twin = passes_of(network), copy.deepcopy(network)
    for seed in range(3):
        assert equal(attack(passes, drawn(5, seed)), attack(twin, drawn(5, seed)))
        assert equal(network.buffers(), twin.buffers())
    assert int(network[1].num_batches_tracked) == 3
    assert [graph.replays for graph in recorder.graphs] == [3, 3]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_each_kind_of_pass_is_recorded_once_and_leaves_no_trace(recorder, network):
    passes = passes_of(network)
    before = [tensor.clone() for tensor in network.state_dict().values()]
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    for mode in ("batch", "running") * 2:
        with frozen_statistics(network, mode):
            attack(passes, drawn(5))
            attack(passes, drawn(3))
            with torch.no_grad():
                passes(drawn(5))
    assert torch.equal(torch.rand(3), wanted)
    assert equal(network.state_dict().values(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert passes.count == 6
    assert len(recorder.graphs) == 4 * 2 + 2  # a pass without gradients has no way back
    assert {graph.pool for graph in recorder.graphs} == {"pool 1"}


@pytest.mark.parametrize("images_too", [False, True])
def test_a_main_pass_adds_to_the_gradients_of_the_weights(recorder, network, images_too):
    """Over two micro-batches and two steps; nothing that was handed out is overwritten by the next replay."""
    network[4].eval()
    network[5].bias.requires_grad_(False)
    passes, twin = passes_of(network), copy.deepcopy(network)
    for step in range(2):
        kept = []
        for seed in (2 * step, 2 * step + 1):
            found, wanted = drawn(5, seed).requires_grad_(images_too), drawn(5, seed).requires_grad_(images_too)
            embeddings, expected = passes(found, is_main=True), twin(wanted)
            assert torch.equal(embeddings, expected)
            embeddings.square().sum().backward()
            expected.square().sum().backward()
            assert not images_too or torch.equal(found.grad, wanted.grad)
            kept.append(embeddings.detach())
        assert not torch.equal(*kept)
        assert equal(network.buffers(), twin.buffers())
        with torch.no_grad():
            for mine, other in zip(network.parameters(), twin.parameters(), strict=True):
                assert mine.requires_grad == other.requires_grad
                if mine.requires_grad:
                    assert torch.equal(mine.grad, other.grad)
                    mine -= 0.1 * mine.grad
                    other -= 0.1 * other.grad
                mine.grad = other.grad = None
    assert network[5].bias.grad is None
    assert [graph.replays for graph in recorder.graphs] == [4, 4]


def test_a_main_pass_without_gradients_is_another_pass(recorder, network):
    network[4].eval()
    passes, twin = passes_of(network), copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(passes(drawn(5), is_main=True), twin(drawn(5)))
    assert len(recorder.graphs) == 1
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    frozen = passes_of(network)
    assert torch.equal(frozen(drawn(5), is_main=True), twin(drawn(5)))
    assert len(recorder.graphs) == 2


def test_what_is_handed_out_is_not_overwritten(recorder, network):
    passes = passes_of(network)
    with frozen_statistics(network, "batch"):
        first = attack(passes, drawn(5))
        kept = [value.clone() for value in first]
        assert not equal(attack(passes, drawn(5, seed=2)), kept)
    assert equal(first, kept)


def test_the_weights_are_constants_while_they_are_recorded(recorder, network, monkeypatch):
    seen = []
    run = GraphedPasses._run
    monkeypatch.setattr(
        GraphedPasses, "_run", lambda self, *args: seen.append(network[0].weight.requires_grad) or run(self, *args)
    )
    network[4].eval()
    attack(passes_of(network), drawn(5))
    assert seen == [False] * 4  # three rehearsals and the recording
    assert network[0].weight.requires_grad


def test_what_was_frozen_stays_frozen(recorder, network):
    network[0].requires_grad_(False)
    network[4].eval()
    attack(passes_of(network), drawn(5))
    assert not network[0].weight.requires_grad
    assert network[5].weight.requires_grad


def test_a_pass_that_draws_runs_as_it_is(recorder, network):
    passes = passes_of(network)
    torch.manual_seed(3)
    wanted = attack(copy.deepcopy(network), drawn(5))
    torch.manual_seed(3)
    assert equal(attack(passes, drawn(5)), wanted)
    assert not recorder.graphs


@pytest.mark.parametrize("moved", ["weight", "statistic"])
def test_what_moved_is_recorded_again_in_a_new_pool(recorder, network, moved):
    passes = passes_of(network)
    with frozen_statistics(network, "running"):
        attack(passes, drawn(5))
        attack(passes, drawn(3))
    if moved == "weight":
        network[0].weight.data = network[0].weight.data * 2
    else:
        network[1].running_mean = network[1].running_mean + 1
    with frozen_statistics(network, "running"):
        wanted = attack(copy.deepcopy(network), drawn(5))
        for _ in range(2):
            assert equal(attack(passes, drawn(5)), wanted)
    assert passes.count == 1
    assert [graph.pool for graph in recorder.graphs] == ["pool 1"] * 4 + ["pool 2"] * 2


def test_another_pass_in_between_or_a_second_way_back_is_refused(recorder, network):
    passes = passes_of(network)
    with frozen_statistics(network, "batch"):
        images = drawn(5).requires_grad_()
        first = passes(images)
        with torch.no_grad():
            passes(drawn(3))
        with pytest.raises(RuntimeError, match="backward pass before any other pass"):
            torch.autograd.grad(first.sum(), images)
        second = passes(images).sum()
        torch.autograd.grad(second, images, retain_graph=True)
        with pytest.raises(RuntimeError, match="backward pass before any other pass, and once"):
            torch.autograd.grad(second, images)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_failed_recording_is_told_once_and_leaves_no_trace(recorder, network, caplog, monkeypatch, place):
    network[4].eval()
    if place == "forward":
        recorder.fails = True
    else:
        grad = torch.autograd.grad
        monkeypatch.setattr(graphed, "_REHEARSALS", 0)
        monkeypatch.setattr(torch.autograd, "grad", failing)
    passes, twin = passes_of(network), copy.deepcopy(network)
    images = drawn(5).requires_grad_()
    with caplog.at_level(logging.INFO):
        found = passes(images), passes(drawn(3))
    assert equal(found, (twin(images), twin(drawn(3))))
    assert equal(network.state_dict().values(), twin.state_dict().values())
    assert all(parameter.requires_grad for parameter in network.parameters())
    (message,) = [record.getMessage() for record in caplog.records]
    assert "could not be recorded as CUDA graphs and run as they are, slower: RuntimeError: " in message
    assert "\n" not in message
    assert "engine.cuda_graphs: false" in message
    assert recorder.recovered == 1
    if place == "backward":
        monkeypatch.setattr(torch.autograd, "grad", grad)
    caplog.clear()
    passes.settle(is_told=True)
    assert not caplog.records
    assert passes.count == 0


def failing(*args):
    raise RuntimeError("would make the legacy stream depend on a capturing stream")


def test_a_failure_on_another_rank_gives_up_here_too(recorder, network, caplog, monkeypatch):
    passes = passes_of(network)
    with frozen_statistics(network, "batch"):
        attack(passes, drawn(5))
        with caplog.at_level(logging.INFO):
            passes.settle(is_told=True)
            assert "1 recorded" in caplog.text
            monkeypatch.setattr(graphed, "any_rank", lambda condition: True)
            passes.settle(is_told=True)
        assert "Another rank could not record" in caplog.text
        before = len(recorder.graphs)
        attack(passes, drawn(5))
    assert (passes.count, len(recorder.graphs)) == (0, before)


#: Settings, and graphs that they need: two of a pass with gradients, one of another; the main pass has two.
TRAININGS = [
    (("alignment={kind: none}", "batch.micro_batch=4"), 2),
    (("alignment={kind: adversarial, share: 0.5, steps: 2}", "batch.micro_batch=6"), 4),
    (("alignment={kind: adversarial, share: 0.5, consistency_weight: 1.0}", "engine.zero_stage=2"), 5),
    (
        ("alignment={kind: adversarial, share: 0.5, batch_statistics: running}", "model.dropout=0.3"),
        2,  # the main pass draws random numbers
    ),
    (("alignment={kind: adversarial, share: 0.5}", "engine.precision=fp16", "batch.micro_batch=4"), 4),
    (("alignment={kind: adversarial, share: 0.5, release_compat: true}", "batch.micro_batch=6"), 4),
    (("alignment={kind: elastic, share: 0.5}", "engine.zero_stage=0", "engine.batch_norm=frozen"), 4),
    (("alignment={kind: best_of, share: 0.5, candidates: 2}", "engine.precision=fp32"), 3),
    (("alignment={kind: delayed, share: 0.25, consistency_weight: 1.0}",), 3),
    (("alignment={kind: random, share: 0.5}", "engine.zero_stage=0", "batch.micro_batch=6"), 2),
    (
        (
            "alignment={kind: adversarial, share: 0.5}",
            "model={kind: vit, width: 16, depth: 2, heads: 2, patch: 8, mask_ratio: 0.5, embedding_dim: 8, "
            "image_size: 16}",
        ),
        2,  # the main pass masks
    ),
]


@pytest.mark.parametrize(("settings", "graphs"), TRAININGS, ids=lambda value: str(value)[:60])
def test_a_training_is_the_eager_one_bit_for_bit(tmp_path, monkeypatch, settings, graphs):
    eager = train(tmp_path / "eager", *settings)
    recorder = with_stand_in(monkeypatch)
    replayed = train(tmp_path / "graphs", *settings, GRAPHS)
    assert len(recorder.graphs) == graphs
    assert min(graph.replays for graph in recorder.graphs) >= 5
    assert replayed.losses == eager.losses
    assert replayed.grad_norms == eager.grad_norms
    assert all(torch.equal(replayed.tensors[name], value) for name, value in eager.tensors.items())


def test_all_is_recorded_before_the_first_step(tmp_path, recorder, monkeypatch):
    from aroface.engine.trainer import Trainer

    seen = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *args: seen.append(len(recorder.graphs)) or step(self, *args))
    train(tmp_path / "run", GRAPHS, "schedule.epochs=0.5")
    assert seen == [4, 4, 4]


def test_both_kinds_of_attack_pass_are_recorded_before_the_first_step(tmp_path, monkeypatch):
    from aroface.engine.trainer import Trainer

    monkeypatch.setattr(alignment, "STEPS_TO_SETTLE", 3)
    settings = ("alignment={kind: adversarial, share: 0.5}",)
    eager = train(tmp_path / "eager", *settings)
    recorder = with_stand_in(monkeypatch)
    seen, step = [], Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *args: seen.append(len(recorder.graphs)) or step(self, *args))
    replayed = train(tmp_path / "graphs", *settings, GRAPHS)
    assert set(seen) == {6}  # main pass, attack by the batch, attack by running averages
    assert min(graph.replays for graph in recorder.graphs) >= 3
    assert replayed.losses == eager.losses
    assert all(torch.equal(replayed.tensors[name], value) for name, value in eager.tensors.items())


def test_a_training_that_cannot_record_is_the_eager_one(tmp_path, recorder, caplog):
    eager = train(tmp_path / "eager")
    recorder.fails = True
    fallen = train(tmp_path / "fallen", GRAPHS)
    assert not recorder.graphs
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in warnings].count("aroface.engine.graphed") == 1
    assert fallen.losses == eager.losses
    assert all(torch.equal(fallen.tensors[name], value) for name, value in eager.tensors.items())


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("engine", {"zero_stage": 3}, "engine.zero_stage = 3, .*use stage 0, 1 or 2, or engine.cuda_graphs: false"),
        ("engine", {"batch_norm": "sync"}, "engine.batch_norm = sync, .*use local or frozen"),
        ("engine", {"compile": True}, "engine.compile: true, .*set engine.compile: false"),
        ("model", {"checkpoint_activations": True}, "set model.checkpoint_activations: false"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(section, changes, message):
    values = tiny_config().model_dump(mode="json")
    values["engine"]["cuda_graphs"] = True
    values["alignment"] = {"kind": "adversarial", "share": 0.5}
    deepspeed_settings(TrainConfig.model_validate(values), 1)
    values[section] |= changes
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(TrainConfig.model_validate(values), 1)


def test_the_published_attack_on_a_network_with_dropout_is_refused(tmp_path, recorder):
    published = "alignment={kind: adversarial, share: 0.5, release_compat: true}"
    with pytest.raises(ConfigError, match=r"draws random numbers; set model.dropout: 0 .*, or engine.cuda_graphs"):
        train(tmp_path / "run", GRAPHS, published, "model.dropout=0.3")


def test_on_a_cpu_graphs_are_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="engine.cuda_graphs: true needs a GPU.*set it to false"):
        train(tmp_path / "run", GRAPHS, f"batch.global_batch={BATCH}")
