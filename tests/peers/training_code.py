"""A training step of arcface_torch and of the ARoFace release, by their own code from checkouts on this machine.

Nothing of them lies in this repository: backbone, classifier, margin and attack are imported from the checkout, and the
loop that their `train_v2.py` runs around them is stated here. That file itself cannot be imported without NCCL. Where
there is no GPU, `.cuda()` returns what it is called on. `REPLACED` lists everything that differs from their run.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from tests.peers.public_code import importable

REPLACED = (
    "no data loader: one random float batch lies on the device; ours starts from uint8 and normalises and flips it",
    "a constant learning rate: their scheduler passes an argument that PyTorch has dropped",
    "no logging besides the read-out of the loss, no verification",
    "without a GPU: .cuda() does nothing, gloo in the place of NCCL, fp32 as cfg.fp16 = False has it",
)


@dataclass(frozen=True)
class TrainingCode:
    """What a checkout brings to a step."""

    get_model: Callable[..., torch.nn.Module]
    partial_fc: Callable[..., torch.nn.Module]
    margin_loss: Callable[..., torch.nn.Module]
    attack: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None  #: of the ARoFace release


def training_code(folder: Path) -> TrainingCode:
    """Import it from the folder that holds `train_v2.py`."""
    modules = ("backbones", "partial_fc_v2", "losses", "AdvWarp")
    with importable(folder, *modules):
        backbones, classifier, losses = map(importlib.import_module, modules[:3])
        has_attack = (folder / "AdvWarp.py").is_file()
        attack = importlib.import_module("AdvWarp").adversarial_img_warping if has_attack else None
    return TrainingCode(backbones.get_model, classifier.PartialFC_V2, losses.CombinedMarginLoss, attack)


@contextlib.contextmanager
def cuda_calls_allowed() -> Iterator[None]:
    """Where there is no GPU, `.cuda()` of tensors and modules returns them as they are."""
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        mock.patch.object(torch.nn.Module, "cuda", lambda module, *_, **__: module),
    ):
        yield


class PeerStep:
    """Their network, classifier and optimiser, stepped on one batch; needs a process group.

    Args:
        code: of one checkout.
        depth: of the network.
        batch: images; divisible by 4, or their attack shortens the batch.
        classes: of the classifier.
        precision: fp32; fp16, which is theirs on GPUs; bf16, autocast around their network, which they do not have.
    """

    def __init__(self, code: TrainingCode, *, depth: int, batch: int, classes: int, precision: str) -> None:
        self._code = code
        self._has_gpu = torch.cuda.is_available()
        self._fp16, self._bf16 = precision == "fp16", precision == "bf16"
        torch.manual_seed(0)
        with cuda_calls_allowed():
            network = code.get_model(f"r{depth}", dropout=0.0, fp16=self._fp16, num_features=512).cuda()
            margin = code.margin_loss(64, 1.0, 0.5, 0.0, 0)  # scale, m1, m2, m3: ArcFace; no filter
            self._classifier = code.partial_fc(margin, 512, classes, 1.0, False).train().cuda()
            self._images = torch.empty(batch, 3, 112, 112).uniform_(-1, 1).cuda()
            self._labels = torch.randint(0, classes, (batch,)).cuda()
        self._backbone = _distributed(network, is_static=code.attack is None)
        self._optimizer = torch.optim.SGD(
            [{"params": self._backbone.parameters()}, {"params": self._classifier.parameters()}],
            lr=1e-4,
            momentum=0.9,
            weight_decay=5e-4,
        )
        self._scaler: Any = torch.amp.GradScaler("cuda", growth_interval=100) if self._fp16 else None

    def plain(self) -> int:
        """One step; returns the number of images."""
        with cuda_calls_allowed():
            return self._step(self._images, self._labels.clone())

    def attacked(self) -> int:
        """One step of the ARoFace release, with the settings of its configurations."""
        assert self._code.attack is not None
        with cuda_calls_allowed():
            images, labels = self._code.attack(
                backbone=self._network,
                img=self._images,
                module_partial_fc=self._classifier,
                local_labels=self._labels.clone(),
                ratio=0.75,
                eta_scale=0.1,
                eta_theta=0.1,
                eta_t=0.1,
            )
            return self._step(images, labels)

    def _network(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            embeddings: torch.Tensor = self._backbone(images)
        return embeddings.float()

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        loss = self._classifier(self._network(images), labels)
        if self._scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._backbone.parameters(), 5)
            self._optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._backbone.parameters(), 5)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad()
        self.loss = loss.item()
        if self._has_gpu:
            torch.cuda.synchronize()
        return len(labels)


def _distributed(network: torch.nn.Module, *, is_static: bool) -> DistributedDataParallel:
    """As both projects wrap it; only arcface_torch declares the graph static."""
    wrapped = DistributedDataParallel(
        network,
        broadcast_buffers=False,
        device_ids=[0] if torch.cuda.is_available() else None,
        bucket_cap_mb=16,
        find_unused_parameters=True,
    )
    wrapped.register_comm_hook(None, fp16_compress_hook)
    wrapped.train()
    if is_static:
        wrapped._set_static_graph()
    return wrapped
