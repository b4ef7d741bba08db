"""What every backbone promises, whatever its kind; the names of the public weights; and what is special in the ViT."""

import copy

import pytest
import torch
from torch import nn

from aroface.alignment import frozen_statistics
from aroface.config import parse_config
from aroface.config.model import VIT_SIZES, ModelSection
from aroface.errors import ConfigError, ShapeError
from aroface.models import VisionTransformer, build_backbone
from aroface.models.neck import Fp32BatchNorm1d, Fp32Linear, in_fp32
from aroface.models.vit import DropPath
from tests.helpers import layouts

SIZE = 32
SMALL = {
    "iresnet": {"kind": "iresnet", "depth": 18, "width": 0.125, "dropout": 0.3},
    "ir": {"kind": "ir", "depth": 18, "width": 0.125},
    "mobilefacenet": {"kind": "mobilefacenet", "size": "base"},
    "mobilefacenet-large": {"kind": "mobilefacenet", "size": "large"},
    "vit": {"kind": "vit", "width": 32, "depth": 3, "heads": 4, "patch": 6, "drop_path": 0.3, "mask_ratio": 0.3},
}
KINDS = pytest.mark.parametrize("kind", SMALL)


def build(settings, **changes):
    values = {"embedding_dim": 16, "image_size": SIZE, **settings, **changes}
    torch.manual_seed(0)
    return build_backbone(parse_config({"model": values}, ModelSection, name="test").model)


def images(count=4, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def step(backbone, batch):
    """One training pass from a fixed seed: embeddings and gradients by name."""
    torch.manual_seed(5)
    embeddings = backbone(batch)
    embeddings.pow(3).sum().backward()
    return embeddings.detach(), {name: p.grad for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("kind", ["iresnet", "ir"])
def test_dropout_acts_in_training_alone(kind):
    """Two training passes differ with dropout and are equal without; evaluation does not know of it."""
    with_it, without = (build(SMALL[kind], dropout=dropout) for dropout in (0.3, 0.0))
    without.load_state_dict(with_it.state_dict())
    batch = images()
    for backbone, differs in ((with_it, True), (without, False)):
        with torch.no_grad():
            first, second = (copy.deepcopy(backbone).train()(batch) for _ in range(2))
        assert torch.equal(first, second) is not differs
    with torch.no_grad():
        assert torch.equal(with_it.eval()(batch), without.eval()(batch))


@KINDS
def test_embeddings_are_finite_and_every_trained_parameter_learns(kind):
    backbone = build(SMALL[kind])
    embeddings, gradients = step(backbone, images())
    assert embeddings.shape == (4, 16)
    assert embeddings.dtype == torch.float32
    assert torch.isfinite(embeddings).all()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is not None} == trained
    dead = [name for name in trained if not gradients[name].any() or not torch.isfinite(gradients[name]).all()]
    assert dead == []
    assert len(trained) > 10


@KINDS
def test_recomputed_activations_change_nothing(kind):
    plain, recomputing = build(SMALL[kind]), build(SMALL[kind], checkpoint_activations=True)
    outputs = [step(backbone, images()) for backbone in (plain, recomputing)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    for name, gradient in outputs[0][1].items():
        if gradient is not None:
            torch.testing.assert_close(outputs[1][1][name], gradient, msg=name)
    # a second pass over the batch must not enter the running statistics a second time
    for (name, a), (_, b) in zip(plain.state_dict().items(), recomputing.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@KINDS
def test_recomputing_really_frees_activations(kind):
    sizes = []
    for recompute in (False, True):
        backbone = build(SMALL[kind], checkpoint_activations=recompute)
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone(images(8))
        parameters = sum(p.untyped_storage().nbytes() for p in backbone.parameters())
        sizes.append(sum(kept.values()) - parameters)
    assert sizes[1] < 0.5 * sizes[0]


@KINDS
def test_memory_layout_does_not_change_the_embeddings(kind):
    # in float64, for the batch norms of a small batch amplify rounding
    batches = [images().double().contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)]
    (one, a), (other, b) = (step(build(SMALL[kind]).double(), batch) for batch in batches)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    for name, gradient in a.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, b[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@KINDS
def test_the_attack_pass_draws_nothing_and_leaves_nothing(kind, recompute):
    backbone = build(SMALL[kind], checkpoint_activations=recompute)
    before, generator = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    batch = images().requires_grad_()
    with frozen_statistics(backbone, "batch"):
        (gradient,) = torch.autograd.grad(backbone(batch).square().sum(), batch)
    assert gradient.any()
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@KINDS
def test_half_precision_stays_finite_and_close(kind):
    backbone = build(SMALL[kind]).eval()
    exact = backbone(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(images())
    half = backbone.half()(images().half())
    for low in (mixed, half):
        assert low.dtype == torch.float32
        assert nn.functional.cosine_similarity(low, exact).min() > 0.99


def test_the_neck_survives_sums_beyond_the_range_of_fp16():
    linear, norm = Fp32Linear(25088, 8), Fp32BatchNorm1d(8)
    nn.init.constant_(linear.weight, 4.0)
    norm.running_var.fill_(1e10)
    neck = nn.Sequential(linear, norm).half().eval()
    features = torch.ones(2, 25088, dtype=torch.float16)
    found = in_fp32(features, *neck)
    assert float(linear.weight.detach().sum(1).max()) > torch.finfo(torch.float16).max
    torch.testing.assert_close(found, torch.full_like(found, 25088 * 4 / 1e5), rtol=1e-3, atol=0)
    assert {value.dtype for value in neck.state_dict().values()} == {torch.float32, torch.int64}
    assert neck.double()(features.double()).dtype == torch.float64


def test_double_precision_runs_through_for_oracles():
    assert build(SMALL["vit"]).double().eval()(images().double()).dtype == torch.float64


PUBLISHED = {
    **{f"iresnet{d}": ({"kind": "iresnet", "depth": d}, layouts.iresnet(d)) for d in (18, 34, 50, 100, 200)},
    **{f"ir{d}": ({"kind": "ir", "depth": d}, layouts.ir(d)) for d in (18, 34, 50, 101)},
    "mobilefacenet": ({"kind": "mobilefacenet", "size": "base"}, layouts.mobilefacenet()),
    "mobilefacenet-large": ({"kind": "mobilefacenet", "size": "large"}, layouts.mobilefacenet(large=True)),
    **{
        f"vit-{name}": ({"kind": "vit", "width": width, "depth": depth}, layouts.vit(width, depth))
        for name, (width, depth) in VIT_SIZES.items()
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_public_weights(name):
    settings, expected = PUBLISHED[name]
    config = parse_config({"model": settings}, ModelSection, name="test").model
    with torch.device("meta"):
        state = build_backbone(config).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert config.name == name


def test_names_tell_what_is_not_published():
    def name(**settings):
        return parse_config({"model": settings}, ModelSection, name="test").model.name

    assert name(kind="ir", depth=50, width=0.5) == "ir50-w0.5"
    assert name(kind="vit", width=512, depth=24, heads=16, patch=8, mlp_ratio=3.0) == "vit-512x24-h16-p8"


@KINDS
def test_wrong_image_size_is_named(kind):
    with pytest.raises(ShapeError, match=r"set model\.image_size or resize"):
        build(SMALL[kind])(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize("kind", ["ir", "mobilefacenet"])
def test_too_small_an_image_size_is_refused(kind):
    section = parse_config({"model": {"image_size": 16, **SMALL[kind]}}, ModelSection, name="test").model
    with pytest.raises(ShapeError, match="use 16 px or more"):
        build_backbone(section.model_copy(update={"image_size": 15}))


def test_a_kind_that_does_not_exist_and_a_setting_of_another_kind_are_named():
    with pytest.raises(ConfigError, match="'iresnet', 'ir', 'mobilefacenet', 'vit'"):
        parse_config({"model": {"kind": "swin"}}, ModelSection, name="test")
    with pytest.raises(ConfigError, match=r"model\.depth is not a setting"):
        parse_config({"model": {**SMALL["mobilefacenet"], "depth": 18}}, ModelSection, name="test")
    with pytest.raises(ConfigError, match="choose a divisor"):
        VisionTransformer(width=30, depth=1, heads=8)


def test_left_out_patches_hold_the_mask_token_and_the_others_are_untouched():
    backbone = build(SMALL["vit"], mask_ratio=0.4, drop_path=0.0)
    with torch.no_grad():
        for block in backbone.blocks:  # blocks that pass the tokens on, so that each place can be told from the others
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
    seen = []
    backbone.feature[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(1, (25, 32))))
    backbone(images(6))
    backbone.eval()(images(6))
    masked, whole = seen
    is_token = (masked == backbone.mask_token).all(2)
    assert (is_token.sum(1) == 25 - int(25 * 0.6)).all()
    assert torch.equal(masked[~is_token], whole[~is_token])
    assert len({tuple(row.tolist()) for row in is_token}) > 1  # drawn for every image


def test_without_masking_the_mask_token_is_no_trained_parameter():
    assert not build(SMALL["vit"], mask_ratio=0.0).mask_token.requires_grad
    assert build(SMALL["vit"]).mask_token.requires_grad


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 2, 3))
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, (kept / 0.75)[:, None, None].expand_as(out))
    assert out.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))
