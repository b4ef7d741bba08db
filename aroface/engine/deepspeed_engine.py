"""DeepSpeed around the backbone: start-up, one step, whole weights and momentum in and out.

The only file that imports deepspeed. The class centres stay outside: they are partitioned already. What DeepSpeed does
here is to partition, to average gradients and to step; loss scale, checks and clipping belong to `JointUpdate`.
"""

import datetime
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.modules.batchnorm import _BatchNorm

from aroface.config.schema import TrainConfig
from aroface.distributed import all_reduce, limit_waiting
from aroface.engine.compiled import compile_in_place
from aroface.engine.deepspeed_settings import deepspeed_settings
from aroface.engine.graphed import GraphedBackbone, GraphedPasses, has_graphs
from aroface.engine.joint_update import Gate
from aroface.engine.loss_scale import LossScaler
from aroface.errors import ConfigError
from aroface.models.norm import fuse_norms

__all__ = ["BackboneEngine", "start_distributed"]

_MOMENTUM = "momentum_buffer"
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _RestingSGD(torch.optim.SGD):
    """SGD that can be told to leave everything as it is while DeepSpeed goes through the motions of a step."""

    is_resting = False
    #: Looked at by the fused kernel, where they are set: 1 changes nothing, and the divisor of the gradients.
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.is_resting:
            super().step(closure)


class _Autocast(nn.Module):
    """A backbone that computes in fp16 where that is safe.

    Not DeepSpeed's `torch_autocast`, whose loss scale each rank adjusts for itself (0.19.8), so that ranks could part.
    """

    def __init__(self, backbone: nn.Module, device_type: str) -> None:
        super().__init__()
        self.backbone = backbone
        self._device_type = device_type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self._device_type, dtype=torch.float16):
            embeddings: Tensor = self.backbone(images)
        return embeddings


def start_distributed(timeout_s: float = 1800.0) -> torch.device:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR), or form one of one rank.

    Args:
        timeout_s: how long a collective waits for the other ranks before it fails.

    Returns:
        The device of this rank.
    """
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "nccl"
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device, backend = torch.device("cpu"), "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    # DeepSpeed calls collectives by their old names, and PyTorch says so at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not distributed.is_initialized():
        if "RANK" in os.environ:
            distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
        else:
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return device


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    # Otherwise the first collective on CPU compiles an extension for a minute and a half that nothing here uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


class BackboneEngine:
    """One backbone under DeepSpeed, stepped with a learning rate from outside.

    Args:
        backbone: on its device, with the weights to start from.
        config: the run, with its precision decided (`with_precision`).
        world_size: ranks.

    Raises:
        ConfigError: settings that DeepSpeed or this device cannot follow.
    """

    def __init__(self, backbone: nn.Module, config: TrainConfig, world_size: int) -> None:
        deepspeed = _import_deepspeed()
        self.settings = deepspeed_settings(config, world_size)
        self._precision, self._batch_norm = config.engine.decided_precision, config.engine.batch_norm
        self._stage, self._ranks = config.engine.zero_stage, world_size
        self._device_type = next(backbone.parameters()).device.type
        self.scaler = LossScaler(config.engine)
        self._backbone = self._with_norms(backbone)
        fuse_norms(self._backbone, is_wanted=config.engine.fused_norms)
        if config.engine.compile:
            compile_in_place(self._backbone)
        self.graphed = self._with_graphs(config) if config.engine.cuda_graphs else None
        self._trained = {name: p for name, p in self._backbone.named_parameters() if p.requires_grad}
        # lr 0: DeepSpeed takes one step at start-up to create its state, which must not decay the weights.
        # fused: one pass over weights, gradients and momentum instead of four; the same numbers.
        optimizer = _RestingSGD(
            self._trained.values(),
            lr=0.0,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        model = self._backbone
        if self.graphed is not None:
            model = GraphedBackbone(model, self.graphed)
        elif self._precision == "fp16":
            model = _Autocast(model, self._device_type)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        if world_size == 1 and self._stage == 0:
            # It would still put all gradients into one tensor and copy each of them back.
            self._engine.enable_backward_allreduce = False
        # DeepSpeed sends through a copy of the process group, which it gives PyTorch's own time limit.
        limit_waiting(deepspeed.utils.groups._clone_world_group(), config.engine.timeout_s)
        self._sgd = optimizer
        # A zero momentum equals none, and unlike none it can be saved and set before the first step.
        for parameter in self._stepped():
            optimizer.state[parameter][_MOMENTUM] = torch.zeros_like(parameter)

    def _with_norms(self, backbone: nn.Module) -> nn.Module:
        if self._batch_norm != "sync":
            return backbone
        if self._device_type != "cuda":
            raise ConfigError(
                "engine.batch_norm = sync needs GPUs: PyTorch has no synchronised batch norm on the CPU. Set local, or "
                "frozen for runs that must not depend on the number of ranks."
            )
        synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)  # type: ignore[no-untyped-call]
        return synced

    def _with_graphs(self, config: TrainConfig) -> GraphedPasses:
        if not has_graphs(self._device_type):
            raise ConfigError("engine.cuda_graphs: true needs a GPU and this process trains on a CPU; set it to false.")
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self._backbone.modules())
        if config.alignment.release_compat and draws:
            raise ConfigError(
                "engine.cuda_graphs: true does not go with alignment.release_compat: true on a network with dropout, "
                "whose attack draws random numbers; set model.dropout: 0 (or drop_path and mask_ratio), or "
                "engine.cuda_graphs: false."
            )
        return GraphedPasses(self._backbone, lambda: self.autocast(is_cached=False))

    def _stepped(self) -> list[Tensor]:
        """The tensors that the optimiser steps: parameters, or this rank's flat partitions of them."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._sgd.param_groups for parameter in group["params"]]

    @property
    def backbone(self) -> nn.Module:
        """The network itself, without what the precision puts around it."""
        return self._backbone

    @property
    def module(self) -> nn.Module:
        """The backbone as it is trained; called without the engine in passes that are not to reach DeepSpeed."""
        module: nn.Module = self._engine.module
        return module

    def autocast(self, *, is_cached: bool = True) -> AbstractContextManager[object]:
        """Precision of the passes through `module`; cached: weights are rounded once per context, not once per use."""
        dtype = _AUTOCAST[self._precision]
        return torch.autocast(
            self._device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=is_cached
        )

    def beside(self, images: Tensor) -> Tensor:
        """Embeddings of a pass beside the main one, which forms no gradient of a weight; replayed if so configured."""
        if self.graphed is not None:
            return self.graphed(images)
        with self.autocast():
            embeddings: Tensor = self.module(images)
        return embeddings

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of a training batch."""
        embeddings: Tensor = self._engine(images)
        return embeddings

    def train(self, mode: bool = True) -> None:
        """Set the training mode of the backbone; frozen batch norms stay in evaluation mode."""
        self._engine.train(mode)
        if self._batch_norm == "frozen":
            for module in self._backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients times the loss scale; the loss is divided by the accumulation steps for the head too."""
        self._engine.backward(loss * self.scaler.scale if self.scaler.is_dynamic else loss)

    def is_boundary(self) -> bool:
        """Whether the next `step` updates the weights; asked before `step`."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @property
    def replicas(self) -> int:
        """Ranks that hold each part of `gradients`."""
        return self._ranks if self._stage == 0 else 1

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the averaged gradient, at the boundary, before `step`; `step` reads these tensors."""
        if self._stage == 0:
            for parameter in self._trained.values():
                if parameter.grad is None:  # DeepSpeed does it where there are ranks to add up
                    parameter.grad = torch.zeros_like(parameter)
            return [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        groups = self._engine.optimizer.averaged_gradients.values()
        return [part for group in groups if group is not None for part in group]

    def step(self, lr: float, gate: Gate | None = None) -> None:
        """Update at the accumulation boundary, unless the gate is shut; between boundaries only count."""
        for group in self._sgd.param_groups:
            group["lr"] = lr
        self._sgd.found_inf, self._sgd.grad_scale = gate or (None, None)
        self._engine.step()

    def skip(self) -> None:
        """Count a step at the boundary that changes nothing, and forget its gradients."""
        gradients = self.gradients()
        if gradients:
            torch._foreach_zero_(gradients)
        self._sgd.is_resting = True
        try:
            self._engine.step()
        finally:
            self._sgd.is_resting = False

    def weights(self, *, settle: bool, is_wanted: bool = True) -> dict[str, Tensor]:
        """The whole state dict of the backbone in fp32 on the CPU; a collective. Batch-norm statistics are averaged.

        Args:
            settle: also give every rank the averaged statistics, so that the run goes on from what a resume would load.
            is_wanted: False on ranks that only take part; they get an empty dict.
        """
        import deepspeed

        statistics = self._mean_statistics()
        if settle:
            for name, value in self._backbone.named_buffers():
                if name in statistics:
                    value.copy_(statistics[name])
        found: dict[str, Tensor] = {}
        for name, value in self._backbone.named_parameters():
            # Under stage 3 every rank holds a slice, of the frozen parameters too; elsewhere this gathers nothing.
            with deepspeed.zero.GatheredParameters([value], enabled=self._stage == 3):
                if is_wanted:
                    found[name] = _to_cpu(value)
        if not is_wanted:
            return {}
        buffers = {name: _to_cpu(statistics.get(name, value)) for name, value in self._backbone.named_buffers()}
        return {name: (found | buffers)[name] for name in self._backbone.state_dict()}

    def _mean_statistics(self) -> dict[str, Tensor]:
        """Running statistics averaged over ranks, in one collective."""
        running = {
            name: value
            for name, value in self._backbone.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }
        if self._ranks == 1 or not running:
            return running
        flat = torch.cat([value.flatten() for value in running.values()])
        parts = torch.split(all_reduce(flat) / self._ranks, [value.numel() for value in running.values()])
        return {name: part.view_as(running[name]) for name, part in zip(running, parts, strict=True)}

    def momentum(self, *, is_wanted: bool = True) -> dict[str, Tensor]:
        """Momentum of every trained parameter, whole, fp32 on the CPU; a collective. `is_wanted` as in `weights`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        found: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            if self._stage == 0:
                value = self._sgd.state[parameter][_MOMENTUM]
            else:
                value = safe_get_full_optimizer_state(parameter, _MOMENTUM)
            if is_wanted:
                found[name] = _to_cpu(value)
        return found

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Set the momentum of every trained parameter from whole tensors."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._link_states()
        for name, parameter in self._trained.items():
            value = momentum[name].to(self._engine.device)
            match self._stage:
                case 0:
                    self._sgd.state[parameter][_MOMENTUM] = value.clone()
                case 3:
                    safe_set_local_optimizer_state(parameter, _partition(value, parameter), _MOMENTUM)
                case _:
                    safe_set_full_optimizer_state(parameter, value, _MOMENTUM)

    def _link_states(self) -> None:
        """DeepSpeed ties parameters to their optimiser state at the first step; here it is wanted before."""
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _partition(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's slice of a whole tensor under stage 3: all slices are equally long, the last is filled with zeros."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = distributed.get_rank() * size
    own = value.flatten()[start : start + size]
    return torch.cat([own, own.new_zeros(size - own.numel())])
