"""`aroface plan`: formulas against counts by brute force, and properties that any budget has."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from aroface.config import TrainConfig, load_config
from aroface.config.model import IResNetConfig
from aroface.engine.task import FaceTask
from aroface.errors import ConfigError
from aroface.heads import HeadSGD, build_head
from aroface.models import build_backbone
from launch.cli import main
from launch.plan.advice import fewest_gpus, remedies
from launch.plan.backbone import BackboneCounts, StorageMeter, count_backbone
from launch.plan.budget import Exchange, communication, head_flop, memory, plan, step_time
from launch.plan.hardware import GPUS, Efficiency
from launch.plan.passes import extra_passes
from launch.plan.workload import Workload, workload_of
from tests.helpers.training import BATCH, COMPARABLE, config_of, train

CONFIG = Path(__file__).parents[3] / "configs" / "smoke" / "tiny.yaml"
H100 = GPUS["h100"]
R100 = BackboneCounts(
    parameters=65_156_160, forward_flop=24.18e9, recomputed_flop=0.0, activation_bytes=56e6, fixed_bytes=1.6e8
)
WORK = Workload(
    backbone=R100,
    precision="bf16",
    zero_stage=1,
    bucket_numbers=500_000_000,
    gpus=8,
    micro_batch=128,
    accumulation=1,
    classes=617_970,
    embedding_dim=512,
    sample_rate=1.0,
    chunk_classes=8192,
    logit_precision="fp32",
    attack_passes=0.25,
)


def multiply_adds(backbone, image_size):
    """Of the convolutions and linear layers, from the shapes of their outputs."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
        else:
            total += module.in_features * module.out_features

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    backbone(torch.zeros(2, 3, image_size, image_size))
    return total


def test_counts_of_a_network_equal_those_of_its_layers():
    config = IResNetConfig(kind="iresnet", depth=18, width=0.25, image_size=48, embedding_dim=64)
    counts = count_backbone(config, precision="fp32")
    backbone = build_backbone(config)
    assert counts.parameters == sum(p.numel() for p in backbone.parameters())
    assert counts.forward_flop == 2 * multiply_adds(backbone, 48)
    assert counts.training_flop == 3 * counts.forward_flop


def test_activations_counted_without_data_are_those_of_a_real_pass():
    config = IResNetConfig(kind="iresnet", depth=18, width=0.125, image_size=32, embedding_dim=16)
    counts = count_backbone(config, precision="fp32")
    backbone = build_backbone(config).train()
    peaks = []
    for batch in (64, 128):
        images = torch.zeros(batch, 3, 32, 32)
        with StorageMeter([images, *backbone.parameters(), *backbone.buffers()]) as meter:
            backbone(images).sum().backward()
        backbone.zero_grad(set_to_none=True)
        peaks.append(meter.peak)
    assert counts.activation_bytes * 64 == pytest.approx(peaks[1] - peaks[0], rel=1e-3)


def test_the_published_size_has_the_known_figures():
    """24.03 M parameters, 2.61 G multiply-adds; 46.1 MB of saved activations in fp32, half of it in bf16."""
    fp32, bf16 = (count_backbone(IResNetConfig(kind="iresnet", depth=18), precision=name) for name in ("fp32", "bf16"))
    assert fp32.parameters == pytest.approx(24.03e6, rel=1e-3)
    assert fp32.forward_flop == pytest.approx(2 * 2.610e9, rel=1e-3)
    assert fp32.activation_bytes == pytest.approx(46.1e6, rel=0.02)
    assert bf16.activation_bytes == pytest.approx(23.1e6, rel=0.02)


def test_checkpointing_trades_memory_for_arithmetic():
    plain, less = (
        count_backbone(
            IResNetConfig(kind="iresnet", depth=34, width=0.25, checkpoint_activations=flag), precision="bf16"
        )
        for flag in (False, True)
    )
    assert less.activation_bytes < 0.55 * plain.activation_bytes
    assert less.training_flop == pytest.approx(4 / 3 * plain.training_flop, rel=0.02)


def ring_all_reduce_bytes(ranks, numbers):
    """Bytes that rank 0 sends when a ring reduces and then gathers, piece by piece; pieces divide evenly."""
    piece = numbers // ranks
    sent = 0
    for _phase in ("reduce-scatter", "all-gather"):
        for _step in range(ranks - 1):
            sent += 4 * piece
    return sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_sent_bytes_are_those_of_a_ring(ranks):
    numbers = 240
    assert Exchange("x", "all_reduce", 4 * numbers, 1).sent(ranks) == ring_all_reduce_bytes(ranks, numbers)
    assert Exchange("x", "all_gather", 4 * numbers, 2).sent(ranks) == ring_all_reduce_bytes(ranks, numbers)
    assert Exchange("x", "all_reduce", 4 * numbers, 1).sent(1) == 0


def test_a_network_between_nodes_only_makes_it_slower():
    exchange, efficiency = Exchange("x", "all_reduce", 1e9, 1), Efficiency()
    inside, outside = exchange.seconds(8, H100, efficiency), exchange.seconds(16, H100, efficiency)
    assert 0 == exchange.seconds(1, H100, efficiency) < inside < outside
    assert exchange.seconds(512, H100, efficiency) < 2 * outside  # rings do not grow with the ranks


def test_head_arithmetic_equals_the_products_it_makes():
    """Three products of (N, D), (C, D) when the logits are kept, four when they are formed again."""
    work = replace(WORK, attack_passes=0.0, gpus=1, classes=1000, chunk_classes=1000)
    product = 2 * work.gathered * 1000 * 512
    assert head_flop(work) == 3 * product
    assert head_flop(replace(work, chunk_classes=100)) == 4 * product
    assert head_flop(replace(work, sample_rate=0.5, chunk_classes=100)) == 2 * product


def grown(work, **changes):
    return memory(replace(work, **changes))


def test_totals_add_up_and_more_of_anything_costs_more():
    base = memory(WORK)
    assert base.total == sum(asdict(base).values())
    time = step_time(WORK, H100, Efficiency())
    assert time.total == sum(asdict(time).values())
    for changes in ({"classes": 1_000_000}, {"micro_batch": 256}, {"chunk_classes": 16384}, {"embedding_dim": 1024}):
        assert grown(WORK, **changes).total > base.total
    assert grown(WORK, gpus=64).head_state < base.head_state
    assert grown(WORK, sample_rate=0.1).head_gradient < base.head_gradient


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_zero_stage_keeps_less_of_the_backbone(precision):
    stages = [grown(WORK, zero_stage=stage, precision=precision) for stage in range(4)]
    kept = [one.backbone_weights + one.backbone_optimizer + one.backbone_gradients for one in stages]
    assert kept == sorted(kept, reverse=True)
    whole = 4 * R100.parameters
    assert kept[0] == 3 * whole
    assert kept[3] == pytest.approx(4 * whole / 8)
    one_gpu = [grown(WORK, zero_stage=stage, gpus=1).backbone_optimizer for stage in (0, 1)]
    assert one_gpu == [whole, 2 * whole]  # partitioning over one rank only adds the copy


def test_every_class_and_every_positive_has_a_place():
    for gpus in (1, 3, 8, 512):
        for rate in (1.0, 0.1, 1e-6):
            work = replace(WORK, gpus=gpus, sample_rate=rate, classes=10_007)
            assert (work.local_classes - 1) * gpus < 10_007 <= work.local_classes * gpus
            assert 1 <= work.sampled_classes <= work.local_classes
    assert replace(WORK, sample_rate=1e-6).sampled_classes == WORK.micro_batch


def test_sampling_and_better_machines_save_time():
    plain = step_time(WORK, H100, Efficiency())
    assert step_time(replace(WORK, sample_rate=0.1), H100, Efficiency()).head < 0.2 * plain.head
    assert step_time(WORK, GPUS["a100"], Efficiency()).total > plain.total
    assert step_time(WORK, H100, Efficiency(backbone=0.5)).backbone == pytest.approx(plain.backbone / 2)
    assert step_time(WORK, H100, Efficiency(overlap=1.0)).backbone_exchange == 0
    twice = replace(WORK, accumulation=2)
    assert step_time(twice, H100, Efficiency()).backbone == pytest.approx(2 * plain.backbone)
    assert communication(twice).backbone == communication(WORK).backbone


@pytest.mark.parametrize(("classes", "chunk", "rate"), [(20_000, 1024, 1.0), (20_000, 1024, 0.1), (3_000, 4096, 1.0)])
def test_head_memory_is_that_of_a_real_step(classes, chunk, rate):
    """Forward, backward and update of the head on the CPU; everything it holds, at the peak."""
    rows, dim = 64, 128
    settings = [f"head.chunk_classes={chunk}", f"head.sample_rate={rate}", "alignment.kind=none"]
    config = load_config(CONFIG, TrainConfig, settings)
    labels = torch.randint(0, classes, (rows,))
    embeddings = torch.randn(rows, dim, requires_grad=True)
    with StorageMeter() as meter:
        head = build_head(config.head, num_classes=classes, embedding_dim=dim, seed=0)
        optimizer = HeadSGD(head, momentum=0.9, weight_decay=5e-4)
        meter.peak = meter.live
        for step in range(2):
            head(embeddings, labels, step=step).backward()
            optimizer.step(0.1)
    work = replace(
        WORK, gpus=1, micro_batch=rows, classes=classes, embedding_dim=dim, chunk_classes=chunk, sample_rate=rate
    )
    planned = memory(work)
    total = planned.head_state + planned.head_gradient + planned.head_chunk
    assert meter.live == pytest.approx(planned.head_state, rel=0.05)
    assert 0.75 * total <= meter.peak <= 1.1 * total


def test_remedies_fit_and_leave_the_global_batch_alone():
    tight = replace(WORK, micro_batch=2048)
    assert not plan(tight, H100, Efficiency()).fits
    less = replace(R100, activation_bytes=15.3e6, recomputed_flop=R100.forward_flop)
    found = remedies(tight, H100, Efficiency(), checkpointed=less)
    assert {"model.checkpoint_activations=true", "batch.micro_batch=1024"} <= {name for name, _ in found}
    assert all(result.fits for _, result in found)


def test_where_one_change_is_not_enough_several_are_named():
    tight = replace(WORK, gpus=1, micro_batch=1024, classes=14_000_000)
    (only,) = remedies(tight, H100, Efficiency(), checkpointed=None)
    assert only[1].fits
    assert len(only[0].split()) > 1
    hopeless = replace(WORK, gpus=1, classes=100_000_000)
    assert remedies(hopeless, H100, Efficiency(), checkpointed=None) == []
    gpus = fewest_gpus(hopeless, H100, Efficiency())
    assert gpus is not None
    assert plan(replace(hopeless, gpus=gpus), H100, Efficiency()).fits
    assert not plan(replace(hopeless, gpus=gpus // 2), H100, Efficiency()).fits


def test_a_configuration_becomes_a_workload():
    config = load_config(CONFIG, TrainConfig, ["batch.micro_batch=2", "alignment.steps=2"])
    work = workload_of(config, R100, gpus=4, classes=100)
    assert (work.micro_batch, work.accumulation, work.global_batch) == (2, 2, 16)
    assert (work.attack_passes, work.forward_passes, work.backbone_passes) == (0.5, 0, 0)
    with pytest.raises(ConfigError, match="Batch sizes disagree.*3 ranks"):
        workload_of(config, R100, gpus=3, classes=100)


class CountedTask(FaceTask):
    """Counts the images that pass through the network, forward and backward, beyond those of the main pass."""

    forward = backward = 0

    def _embed(self, images):
        self.forward += len(images)
        embeddings = super()._embed(images)
        if embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: setattr(self, "backward", self.backward + len(gradient)))
        return embeddings


@pytest.mark.parametrize(
    "alignment",
    [
        "{kind: none, consistency_weight: 1}",
        "{kind: random, share: 0.5, consistency_weight: 1}",
        "{kind: adversarial, share: 0.5, steps: 2}",
        "{kind: adversarial, share: 0.5, steps: 2, release_compat: true}",
        "{kind: elastic, share: 0.25, steps: 3, consistency_weight: 1}",
        "{kind: best_of, share: 0.5, candidates: 3}",
        "{kind: delayed, share: 0.5}",
    ],
)
def test_the_passes_of_every_attack_are_those_that_a_step_makes(tmp_path, monkeypatch, alignment):
    tasks = []

    def counted(*args, **options):
        tasks.append(CountedTask(*args, **options))
        return tasks[0]

    monkeypatch.setattr("aroface.engine.trainer.FaceTask", counted)
    train(tmp_path / "run", *COMPARABLE, f"alignment={alignment}")
    config = config_of(*COMPARABLE, f"alignment={alignment}")
    work = workload_of(config, R100, gpus=1, classes=100)
    images = 6 * BATCH
    assert tasks[0].backward == images * work.attack_passes
    assert tasks[0].forward == images * (work.attack_passes + work.forward_passes + work.backbone_passes)
    assert extra_passes(config.alignment).total == (tasks[0].forward + tasks[0].backward) / images


def test_further_passes_cost_their_part():
    plain = replace(WORK, attack_passes=0.0)
    for change, backbone, products, exchanges in (
        ({"attack_passes": 1.0}, 2, 3, (2, 2, 2)),
        ({"forward_passes": 1.0}, 1, 1, (2, 2, 1)),
        ({"backbone_passes": 1.0}, 1, 0, (1, 1, 1)),
    ):
        work = replace(plain, **change)
        times = [step_time(one, H100, Efficiency()) for one in (work, plain)]
        assert times[0].backbone / times[1].backbone == pytest.approx((3 + backbone) / 3)
        assert head_flop(work) / head_flop(plain) == pytest.approx((4 + products) / 4)
        assert tuple(exchange.calls for exchange in communication(work).head) == exchanges


def test_the_command_prints_a_budget_that_adds_up(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["plan", str(CONFIG), "--gpus", "2", "--classes", "0.2M", "--images", "1000", "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "200,000 classes, 100,000 on each GPU" in text
    assert "micro-batch 8 x accumulation 1 x 2 ranks = global batch 16" in text
    assert "A model, not a measurement." in text
    assert "2 epochs of 1,000 images" in text
    numbers = json.loads(out.read_text())
    parts = numbers["memory_bytes"]
    assert sum(value for name, value in parts.items() if name not in ("total", "usable")) == parts["total"]
    assert numbers["fits"] is True
    assert numbers["img_per_s"] == pytest.approx(16 / numbers["step_s"]["total"])


def test_a_budget_that_does_not_fit_says_what_to_change(capsys):
    assert main(["plan", str(CONFIG), "--gpus", "1", "--gpu", "a100-40", "--classes", "900M"]) == 2
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "The largest part: class centres and momentum" in text
    assert "x a100-40 at 8 images each (batch.global_batch=" in text


def test_wrong_options_are_explained(capsys):
    for options, message in (
        (("--gpus", "1", "--gpu", "abacus", "--classes", "10"), "choose from a100-40"),
        (("--gpus", "0", "--classes", "10"), "must be 1 or more"),
        (("--gpus", "3", "--classes", "10"), "Batch sizes disagree"),
        (("--gpus", "1", "--classes", "10", "batch.micro_batch=1"), "of 1 images per rank and micro-batch is no image"),
        (("--gpus", "1"), "give --classes C"),
        (("--gpus", "1", "--classes", "10", "--overlap", "2"), "--overlap 2.0 is a share"),
        (("--gpus", "1", "--classes", "10", "--head-efficiency", "0"), "--head-efficiency 0.0 is a share"),
    ):
        assert main(["plan", str(CONFIG), *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(CONFIG), "--gpus", "1", "--classes", "many"])
    assert "is not a number such as 617970 or 10M" in capsys.readouterr().err


def test_the_grid_marks_what_is_too_much(tmp_path, capsys):
    out = tmp_path / "grid.json"
    words = ["plan", str(CONFIG), "model.embedding_dim=512", "--gpus", "2", "--classes", "1M", "--grid"]
    assert main([*words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if line.startswith("| 100 M |")]
    first, *_, last = row.strip("| ").split(" | ")[1:]
    assert "!" in first
    assert "!" not in last
    assert len(json.loads(out.read_text())["cells"]) == 24
