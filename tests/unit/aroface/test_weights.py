"""Files in the layouts of other projects, made by `tests.helpers.layouts` without their code and without ours."""

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aroface.config.load import parse_config
from aroface.config.model import IRConfig, IResNetConfig, ModelSection
from aroface.contract import InputContract
from aroface.engine.checkpoint_layout import BACKBONE_FILE
from aroface.errors import CheckpointError, ConfigError, DataError, ExportError
from aroface.inference import load_embedder, load_model
from aroface.weights import read_weights, write_arcface_torch, write_weights
from aroface.weights.arcface_torch import to_arcface_torch
from tests.helpers import layouts
from tests.helpers.archives import tar_bytes
from tests.helpers.checkpoints import write_checkpoint

NARROW_IRESNET = layouts.iresnet(18, width=8, dim=16, side=2)  # 32 px
NARROW_IR = layouts.ir(18, width=8, dim=16, side=2)


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def lightning(state: dict, hyper_parameters: object = None) -> dict:
    """What AdaFace's trainer saves: the network, its head, and its settings."""
    return {
        "epoch": 3,
        "pytorch-lightning_version": "1.4.4",
        "state_dict": OrderedDict([*layouts.behind("model.", state).items(), ("head.kernel", torch.randn(16, 5))]),
        "hyper_parameters": hyper_parameters or {"arch": "ir_18"},
    }


def same(found: dict, state: dict) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("container", ["bare", "ddp", "all_states", "half", "safetensors"])
def test_arcface_torch_files_give_every_tensor_back(tmp_path, container):
    state = layouts.random_state(NARROW_IRESNET)
    wrapped = {
        "bare": state,
        "ddp": layouts.behind("module.", state),
        "all_states": {
            "epoch": 1,
            "state_dict_backbone": state,
            "state_dict_softmax_fc": {"weight": torch.ones(3, 16)},
        },
        "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        "safetensors": state,
    }[container]
    path = save(tmp_path / ("model.safetensors" if container == "safetensors" else "model.pt"), wrapped)
    weights = read_weights(path)
    expected = {name: v.half().float() if v.is_floating_point() else v for name, v in state.items()}
    assert same(weights.tensors, expected if container == "half" else state)
    assert (weights.model.name, weights.model.image_size) == ("iresnet18-w0.125", 32)
    assert weights.contract == InputContract(image_size=32, colour_order="rgb")
    assert weights.source["layout"] == "arcface_torch"


def test_adaface_files_are_bgr_and_their_head_is_left_out(tmp_path):
    state = layouts.random_state(NARROW_IR)
    weights = read_weights(save(tmp_path / "adaface.ckpt", lightning(state)))
    assert same(weights.tensors, state)
    assert (weights.model.kind, weights.model.depth, weights.contract.colour_order) == ("ir", 18, "bgr")
    assert (weights.source["layout"], weights.source["tensors_ignored"]) == ("adaface", 1)


@pytest.mark.parametrize(("depth", "ours"), [(18, 18), (34, 34), (50, 50), (101, 101)])
def test_depths_are_told_apart(tmp_path, depth, ours):
    state = layouts.random_state(layouts.ir(depth, width=8, dim=16, side=2))
    assert read_weights(save(tmp_path / "x.ckpt", lightning(state))).model.depth == ours
    if depth != 101:
        plain = layouts.random_state(layouts.iresnet(depth, width=8, dim=16, side=2))
        assert read_weights(save(tmp_path / "x.pt", plain)).model.depth == depth


@pytest.mark.parametrize(
    ("prefix", "name", "text"),
    [
        ("net.", "model.yaml", "input_size: [3, 112, 112]\ncolor_space: 'BGR'\nname: 'ir18'\n"),
        ("model.net.", "config.json", '{"architectures": ["X"], "conf": {"color_space": "BGR", "name": "ir18"}}'),
    ],
)
def test_cvlface_says_its_colour_order_in_a_file_beside_the_weights(tmp_path, prefix, name, text):
    state = layouts.random_state(NARROW_IR)
    path = save(tmp_path / "model.safetensors", layouts.behind(prefix, state))
    with pytest.raises(ConfigError, match="Give --colour-order"):
        read_weights(path)
    assert read_weights(path, colour_order="rgb").contract.colour_order == "rgb"
    (tmp_path / name).write_text(text)
    weights = read_weights(path)
    assert same(weights.tensors, state)
    assert (weights.contract.colour_order, weights.source["colour_order_from"]) == ("bgr", name)
    assert weights.source["layout"] == "cvlface"


def test_ir_weights_without_an_origin_want_to_be_told_their_colour_order(tmp_path):
    path = save(tmp_path / "ir.pth", layouts.random_state(NARROW_IR))
    with pytest.raises(ConfigError, match="RGB or BGR"):
        read_weights(path)
    assert read_weights(path, colour_order="bgr").contract.colour_order == "bgr"


def test_mobilefacenet_and_transformers(tmp_path):
    state = layouts.random_state(layouts.mobilefacenet(dim=16, side=2))
    weights = read_weights(save(tmp_path / "mbf.pt", state))
    assert same(weights.tensors, state)
    assert (weights.model.name, weights.model.image_size) == ("mobilefacenet", 32)

    state = layouts.random_state(layouts.vit(32, 2, size=36, dim=16))
    path = save(tmp_path / "vit.pt", state)
    with pytest.raises(ConfigError, match="give it with --heads"):
        read_weights(path)
    weights = read_weights(path, heads=4)
    assert same(weights.tensors, state)
    assert (weights.model.heads, weights.model.patch, weights.model.image_size) == (4, 9, 36)


def test_what_inference_does_not_need_may_be_missing(tmp_path):
    state = layouts.random_state(layouts.vit(32, 2, size=36, dim=16))
    short = {k: v for k, v in state.items() if k != "mask_token" and not k.endswith("num_batches_tracked")}
    weights = read_weights(
        save(tmp_path / "vit.safetensors", layouts.behind("net.", short)), heads=4, colour_order="rgb"
    )
    assert weights.tensors.keys() == state.keys()
    assert not weights.tensors["mask_token"].any()


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        (layouts.vit(512, 24, patch=8, mlp=3.0), 16),
        (layouts.vit(512, 12, patch=8, mlp=5.0), 8),
        (layouts.vit(768, 24), 8),
    ],
    ids=["cvlface-base", "cvlface-small", "vit-l"],
)
def test_heads_of_published_transformers_are_known(shapes, heads):
    from aroface.weights.layouts import recognise

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = recognise(tensors, name="x").config
    assert (config.heads, config.image_size) == (heads, 112)


def test_the_checkpoint_embeds_and_exports_like_any_other(tmp_path):
    from launch.cli import main

    state = layouts.random_state(NARROW_IR)
    path = save(tmp_path / "adaface.ckpt", lightning(state))
    assert main(["import", str(path), "--out", str(tmp_path / "theirs")]) == 0
    model = load_model(tmp_path / "theirs")
    assert model.contract == InputContract(image_size=32, colour_order="bgr")
    assert same(load_file(tmp_path / "theirs" / "step-00000000" / BACKBONE_FILE), state)
    faces = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy((faces[..., ::-1].astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.backbone(pixels).numpy()
    np.testing.assert_allclose(load_embedder(tmp_path / "theirs").embed(faces), expected, rtol=1e-4, atol=1e-4)
    assert main(["import", str(path), "--out", str(tmp_path / "theirs")]) == 2  # never over an existing one


# ---- back to arcface_torch


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double())


@pytest.mark.parametrize("colour_order", ["rgb", "bgr"])
@pytest.mark.parametrize("kind", ["ir", "iresnet"])
def test_a_network_becomes_the_same_iresnet_on_rgb(kind, colour_order):
    """The converted state dict, in an IResNet that is fed RGB, against the original fed in its own order."""
    from aroface.models import IResNet, IRNet

    torch.manual_seed(0)
    narrow = {"embedding_dim": 16, "image_size": 32, "width": 0.125}
    original = (IRNet if kind == "ir" else IResNet)(18, **narrow).eval()
    original.load_state_dict(layouts.random_state(NARROW_IR if kind == "ir" else NARROW_IRESNET))
    config = (IRConfig if kind == "ir" else IResNetConfig)(kind=kind, depth=18)
    contract = InputContract(image_size=112, colour_order=colour_order)
    name, state = to_arcface_torch(config, contract, original.state_dict())
    assert name == "r18"
    assert {key: tuple(value.shape) for key, value in state.items()} == NARROW_IRESNET
    theirs = IResNet(18, **narrow).eval()
    theirs.load_state_dict(state)
    rgb = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = original(rgb if colour_order == "rgb" else rgb.flip(1))
        torch.testing.assert_close(theirs(rgb), expected, rtol=1e-4, atol=1e-5)
    if colour_order == "bgr":
        assert cosines(theirs(rgb), original(rgb)).max() < 0.9999  # the order matters to this network


def test_there_and_back_is_the_same_file_content(tmp_path):
    state = layouts.random_state(layouts.mobilefacenet())
    write_weights(read_weights(save(tmp_path / "mbf.pt", state)), tmp_path / "run")
    assert write_arcface_torch(tmp_path / "run", tmp_path / "back.pt") == "mbf"
    assert same(torch.load(tmp_path / "back.pt", weights_only=True), state)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "iresnet", "depth": 200}, "r200"),
        ({"kind": "mobilefacenet", "size": "large"}, "mbf_large"),
        ({"kind": "vit", "width": 256, "depth": 12}, "vit_t"),
        ({"kind": "vit", "width": 768, "depth": 24}, "vit_l_dp005_mask_005"),
    ],
)
def test_networks_have_the_names_of_arcface_torch(settings, name):
    config = parse_config({"model": settings}, ModelSection, name="x").model
    contract = InputContract(image_size=112, colour_order="rgb")
    weights = {"some.weight": torch.ones(2)}
    assert to_arcface_torch(config, contract, weights) == (name, weights)


def test_networks_that_arcface_torch_lacks_are_refused(tmp_path):
    write_checkpoint(tmp_path / "run")
    with pytest.raises(ExportError, match="no network like iresnet18-w0.125 at 32 px"):
        write_arcface_torch(tmp_path / "run", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
    other = InputContract(image_size=112, colour_order="rgb", mean=0.0, std=255.0)
    with pytest.raises(ExportError, match="export it to ONNX instead"):
        to_arcface_torch(IResNetConfig(kind="iresnet", depth=18), other, {})


# ---- bad input


class _CallsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["AROFACE_TEST_MARK"],)


def test_a_file_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("AROFACE_TEST_MARK", str(mark))
    path = save(tmp_path / "bad.ckpt", lightning(layouts.random_state(NARROW_IR), _CallsCode()))
    with pytest.raises(DataError, match=r"posix\.mkdir.*save the weights alone"):
        read_weights(path)
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": _CallsCode()}, protocol=2))
    with pytest.raises(DataError, match="torch"):
        read_weights(tmp_path / "old.ckpt")
    torch.save(_CallsCode(), tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"posix\.mkdir"):
        read_weights(tmp_path / "older.pt")
    assert not mark.exists()


def foreign_class(monkeypatch, module_name: str, name: str, base: type) -> type:
    """A class that pickles under the name of another project's, whose modules are not there when it is read."""
    parts = module_name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    made = type(name, (base,), {"__module__": module_name})
    setattr(sys.modules[module_name], name, made)
    return made


def test_settings_of_lightning_beside_the_weights_do_no_harm(tmp_path, monkeypatch):
    state = layouts.random_state(NARROW_IR)
    with monkeypatch.context() as patch:
        settings = foreign_class(patch, "pytorch_lightning.utilities.parsing", "AttributeDict", dict)
        callback = foreign_class(patch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object)
        content = lightning(state, settings(arch="ir_18", lr=0.1))
        content["callbacks"] = {callback: {"best_model_score": torch.tensor(0.9)}}
        path = save(tmp_path / "adaface.ckpt", content)
    assert "pytorch_lightning.utilities" not in sys.modules
    assert same(read_weights(path).tensors, state)


def test_an_unknown_class_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        settings = foreign_class(patch, "somewhere.tools", "Hyper", dict)
        path = save(tmp_path / "x.ckpt", lightning(layouts.random_state(NARROW_IR), settings(a=1)))
    with pytest.raises(DataError, match=r"objects of somewhere\.tools\.Hyper"):
        read_weights(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(tmp_path, bad):
    state = layouts.random_state(NARROW_IRESNET)
    state["layer3.1.conv2.weight"][3, 2, 1, 0] = bad
    with pytest.raises(CheckpointError, match=r"module\.layer3\.1\.conv2\.weight holds 1 values that are not finite"):
        read_weights(save(tmp_path / "x.pt", layouts.behind("module.", state)))


def test_negative_variances_are_refused(tmp_path):
    state = layouts.random_state(NARROW_IRESNET)
    state["bn1.running_var"][0] = -1
    with pytest.raises(CheckpointError, match=r"bn1\.running_var holds negative variances"):
        read_weights(save(tmp_path / "x.pt", state))


def _without(shapes: dict, name: str) -> dict:
    return {key: value for key, value in shapes.items() if key != name}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (layouts.ir(18, width=16, dim=16, side=2, squeeze=True), r"se_block\.fc1\.weight \(1, 16, 1, 1\) has no place"),
        (_without(NARROW_IRESNET, "layer2.1.bn2.bias"), r"layer2\.1\.bn2\.bias \(16,\) is missing"),
        (
            NARROW_IRESNET | {"layer2.0.conv1.weight": (16, 8, 1, 1)},
            r"conv1\.weight has the shape \(16, 8, 1, 1\)",
        ),
        (NARROW_IRESNET | {"layer5.0.prelu.weight": (3,)}, r"layer5\.0\.prelu\.weight \(3,\) has no place"),
    ],
    ids=["squeeze-and-excitation", "missing", "shape", "extra"],
)
def test_another_architecture_is_told_by_its_first_tensor(tmp_path, shapes, message):
    path = save(tmp_path / "x.pt", layouts.random_state(shapes))
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path, colour_order="rgb")
    assert "the nearest known network" in str(error.value)
    assert "Known are iresnet" in str(error.value)


def test_a_network_of_another_kind_names_the_nearest_layout(tmp_path):
    torchvision_like = {name: v for name, v in layouts.random_state(NARROW_IRESNET).items() if "prelu" not in name}
    with pytest.raises(CheckpointError, match=r"nearest known layout is iresnet .*of which prelu\.weight"):
        read_weights(save(tmp_path / "resnet.pt", torchvision_like))
    with pytest.raises(CheckpointError, match="Its first tensor is encoder"):
        read_weights(save(tmp_path / "other.pt", {"encoder.weight": torch.ones(3, 3)}))


def test_two_networks_in_one_file_are_refused(tmp_path):
    state = layouts.random_state(NARROW_IRESNET)
    both = {**layouts.behind("student.", state), **layouts.behind("teacher.", state)}
    with pytest.raises(CheckpointError, match=r"student\. \(iresnet\), teacher\. \(iresnet\)"):
        read_weights(save(tmp_path / "x.pt", both))


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(DataError, match="name the weight file itself"):
        read_weights(tmp_path)
    for name in ("x.pt", "x.safetensors", "y.ckpt"):
        (tmp_path / name).write_bytes(b"not a weight file at all" if name != "y.ckpt" else b"")
        with pytest.raises(DataError, match="Fetch the file again"):
            read_weights(tmp_path / name)
    whole = save(tmp_path / "whole.pt", layouts.random_state(NARROW_IRESNET)).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="Fetch the file again"):
        read_weights(tmp_path / "cut.pt")
    with pytest.raises(DataError, match="no state dict of a network"):
        read_weights(save(tmp_path / "list.pt", [1, 2]))
    with pytest.raises(DataError, match="'epoch'"):
        read_weights(save(tmp_path / "empty.pt", {"epoch": 1}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"garbage", "Unsupported operand 103"),
        (tar_bytes([("tensors", b"")]), "legacy .tar format"),
        (b"", "ends too early"),
    ],
)
def test_the_reason_is_told_without_the_advice_to_run_what_the_file_says(tmp_path, content, reason):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_weights(tmp_path / "x.pt")
    assert not any(word in str(caught.value) for word in ("False", "trust", "arbitrary", "http"))


def test_the_command_tells_what_to_do(tmp_path, capsys):
    from launch.cli import main

    write_checkpoint(tmp_path / "run")
    assert main(["import", str(tmp_path / "run"), "--out", str(tmp_path / "x")]) == 2
    assert "add --to arcface_torch" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "run"), "--to", "arcface_torch", "--out", str(tmp_path)]) == 2
    assert "name a file in it" in capsys.readouterr().err
    back = ["import", str(tmp_path / "run"), "--to", "arcface_torch", "--out", str(tmp_path / "x.pt")]
    assert main([*back, "--colour-order", "rgb"]) == 2
    assert "leave it out with --to" in capsys.readouterr().err
