"""The public networks of other projects, built by their own code from checkouts on this machine, with random weights.

Nothing of them lies in this repository. Packages that their files import and these networks do not need are replaced by
empty modules; the three helpers of timm that the transformers do need are stated here.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """One network of one project."""

    project: str  #: insightface, AdaFace or CVLface
    name: str
    build: Callable[[], nn.Module]
    colour_order: str  #: what their code feeds it
    save: Callable[[nn.Module, Path], Path]  #: writes their file into a folder
    arcface_name: str | None = None  #: network that arcface_torch has for the way back


def peers(root: Path) -> list[Peer]:
    """The networks that can be compared, from checkouts `insightface`, `AdaFace` and `CVLface` in `root`."""
    found = []
    if (root / "insightface").is_dir():
        names = ("r18", "r34", "r50", "r100", "r200", "mbf", "mbf_large", "vit_t", "vit_s", "vit_b")
        found += [
            Peer("insightface", name, lambda name=name: arcface_torch(root, name), "rgb", _save_backbone, name)
            for name in (*names, "vit_l_dp005_mask_005")
        ]
    if (root / "AdaFace").is_dir():
        found += [
            Peer("AdaFace", f"ir_{depth}", lambda depth=depth: _adaface(root, depth), "bgr", _save_lightning, f"r{r}")
            for depth, r in ((18, 18), (34, 34), (50, 50), (101, 100))
        ]
    if (root / "CVLface").is_dir():
        found += [
            Peer(
                "CVLface", f"{folder} {name} {colour}", _cvlface_builder(root, folder, name, colour), "rgb", save, back
            )
            for folder, name, colour, save, back in (
                ("iresnet", "ir50", "BGR", _save_cvlface("BGR"), "r50"),
                ("iresnet", "ir101", "RGB", _save_cvlface("RGB"), "r100"),
                ("iresnet_insightface", "ir101", "RGB", _save_cvlface("RGB"), "r100"),
                ("vit", "small", "RGB", _save_hub("RGB"), None),
                ("vit", "base", "RGB", _save_hub("RGB"), None),
            )
        ]
    return found


def randomise(model: nn.Module, seed: int) -> None:
    """Random scales, slopes and statistics around those that keep a deep network in range; evaluation mode."""
    torch.manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0.0, 0.2)
            elif isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, 0.0, 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, module.in_features**-0.5)
        for norm in norms:
            norm.momentum = None  # the plain mean
            norm.reset_running_stats()
        model.train()
        model(torch.randn(6, 3, 112, 112))
        for norm in norms:
            norm.running_mean.add_(0.2 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt())
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
    model.eval()


def arcface_torch(root: Path, name: str) -> nn.Module:
    """`get_model` of InsightFace."""
    with importable(root / "insightface" / "recognition" / "arcface_torch", "backbones"):
        return importlib.import_module("backbones").get_model(name, fp16=False)


def _adaface(root: Path, depth: int) -> nn.Module:
    class Unnormalised(nn.Module):
        """Their network gives the direction and the norm."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            direction, norm = self.net(images)
            return direction * norm

    with importable(root / "AdaFace", "net"):
        return Unnormalised(importlib.import_module("net").build_model(f"ir_{depth}"))


def _cvlface_builder(root: Path, folder: str, name: str, colour: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        run_v1 = root / "CVLface" / "cvlface" / "research" / "recognition" / "code" / "run_v1"
        with importable(run_v1, "models"):
            config = SimpleNamespace(name=name, output_dim=512, color_space=colour, mask_ratio=0.0)
            return importlib.import_module(f"models.{folder}").load_model(config)

    return build


def _save_backbone(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def _save_lightning(model: Any, folder: Path) -> Path:
    state = {f"model.{name}": value for name, value in model.net.state_dict().items()}
    content = {"epoch": 1, "state_dict": {**state, "head.kernel": torch.randn(512, 10)}, "hyper_parameters": {"m": 0.4}}
    torch.save(content, folder / "adaface.ckpt")
    return folder / "adaface.ckpt"


def _save_cvlface(colour: str) -> Callable[[nn.Module, Path], Path]:
    def save(model: nn.Module, folder: Path) -> Path:
        (folder / "model.yaml").write_text(f"input_size: [3, 112, 112]\ncolor_space: '{colour}'\n")
        return _save_backbone(model, folder)

    return save


def _save_hub(colour: str) -> Callable[[nn.Module, Path], Path]:
    """As the models on the hub lie: safetensors, one more prefix, settings in config.json."""

    def save(model: nn.Module, folder: Path) -> Path:
        from safetensors.torch import save_file

        (folder / "config.json").write_text(f'{{"conf": {{"color_space": "{colour}"}}}}')
        save_file({f"model.{name}": value for name, value in model.state_dict().items()}, folder / "model.safetensors")
        return folder / "model.safetensors"

    return save


@contextlib.contextmanager
def importable(folder: Path, *packages: str, stand_ins: dict[str, dict[str, Any]] | None = None) -> Iterator[None]:
    """`packages` from `folder`, with stand-ins for what they import besides torch; all is forgotten afterwards.

    Args:
        folder: that holds them.
        packages: and modules.
        stand_ins: further modules to stand in for, where they are not loaded: name -> attributes.
    """
    before = dict(sys.modules)
    stubs: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {
            "DropPath": _NoDropPath,
            "to_2tuple": lambda x: (x, x),
            "trunc_normal_": nn.init.trunc_normal_,
        },
        "fvcore": {},
        "fvcore.nn": {"flop_count": None},
        "torchvision": {"transforms": None},
        "omegaconf": {"DictConfig": dict, "OmegaConf": None},
        **(stand_ins or {}),
    }
    for name, attributes in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        theirs = [n for n in sys.modules if n in stubs or n.partition(".")[0] in packages]
        for name in theirs:
            if name not in before:
                del sys.modules[name]


class _NoDropPath(nn.Identity):
    """Embeddings are compared in evaluation mode, where stochastic depth does nothing."""
