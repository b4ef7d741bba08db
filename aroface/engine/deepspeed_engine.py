"""DeepSpeed around the backbone: typed settings to its JSON, start-up, one step, whole weights in and out.

The only file that imports deepspeed. The class centres stay outside: they are partitioned already.
"""

import datetime
import logging
import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore

from aroface.config.schema import TrainConfig
from aroface.distributed import all_reduce
from aroface.engine.schedule import accumulation_steps
from aroface.errors import ArofaceError, ConfigError

__all__ = ["BackboneEngine", "NonFiniteGradientError", "deepspeed_settings", "start_distributed"]

_TIMEOUT = datetime.timedelta(minutes=30)
_OWNED_KEYS = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_allow_untested_optimizer", "torch_autocast", "bf16", "fp16", "optimizer", "scheduler"),
    }
)
#: What `engine.deepspeed_extra` may name. DeepSpeed itself accepts a misspelt top-level key in silence.
_EXTRA_KEYS = frozenset(
    {
        *("zero_optimization", "activation_checkpointing", "aio", "comms_logger", "communication_data_type"),
        *(
            "compile",
            "dump_state",
            "flops_profiler",
            "memory_breakdown",
            "prescale_gradients",
            "gradient_predivide_factor",
        ),
        *("sparse_gradients", "wall_clock_breakdown"),
    }
)


class NonFiniteGradientError(ArofaceError):
    """The gradient holds NaN or infinity; nothing was updated."""


class _GuardedSGD(torch.optim.SGD):
    """SGD that looks at the gradient on all ranks before it changes a weight."""

    grad_norm: float = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            # One host synchronisation per step: it is what keeps a bad gradient out of the weights.
            norms = torch.stack(torch._foreach_norm(gradients)).float()
            if not torch.isfinite(all_reduce(norms.square().sum())):
                raise NonFiniteGradientError("The gradient of the backbone is not finite.")
        super().step(closure)


def deepspeed_settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON, every setting that we decide written out.

    Raises:
        ConfigError: batch sizes that do not multiply out, or a key in `engine.deepspeed_extra` that is unknown or ours.
    """
    accumulation = accumulation_steps(config, world_size)
    settings: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.global_batch // (accumulation * world_size),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    for key, value in config.engine.deepspeed_extra.items():
        _check_extra(key)
        if key == "zero_optimization":
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"engine.deepspeed_extra.zero_optimization = {value!r} is not a group of settings; write "
                    "{zero_optimization: {overlap_comm: false}}, or set engine.zero_stage for the stage."
                )
            if "stage" in value:
                raise ConfigError(
                    "engine.deepspeed_extra.zero_optimization.stage is set by engine.zero_stage; use that."
                )
            settings[key].update(value)
        else:
            settings[key] = value
    return settings


def _check_extra(key: str) -> None:
    if key in _OWNED_KEYS:
        raise ConfigError(f"engine.deepspeed_extra.{key} is generated from the other settings; set those instead.")
    if key not in _EXTRA_KEYS:
        near = get_close_matches(key, _EXTRA_KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(_EXTRA_KEYS))}."
        raise ConfigError(f"engine.deepspeed_extra.{key} is not passed to DeepSpeed; {hint}")


def start_distributed() -> torch.device:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR), or form one of one rank.

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
    if not distributed.is_initialized():
        if "RANK" in os.environ:
            distributed.init_process_group(backend, timeout=_TIMEOUT)
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
        config: the run.
        world_size: ranks.
    """

    def __init__(self, backbone: nn.Module, config: TrainConfig, world_size: int) -> None:
        deepspeed = _import_deepspeed()
        self.settings = deepspeed_settings(config, world_size)
        trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        # lr 0: DeepSpeed takes one step at start-up to create its state, which must not decay the weights.
        optimizer = _GuardedSGD(
            trained.values(), lr=0.0, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
        )
        self._engine, *_ = deepspeed.initialize(
            model=backbone, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self._sgd = optimizer
        self._trained = trained
        self._stage = config.engine.zero_stage
        # A zero momentum equals none, and unlike none it can be saved and set before the first step.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @property
    def module(self) -> nn.Module:
        """The backbone."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of a training batch."""
        embeddings: Tensor = self._engine(images)
        return embeddings

    def train(self, mode: bool = True) -> None:
        """Set the training mode of the backbone."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the loss is divided by the accumulation steps for the head's centres as well."""
        self._engine.backward(loss)

    def is_boundary(self) -> bool:
        """Whether the next `step` updates the weights; asked before `step`."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, lr: float) -> None:
        """Update at the accumulation boundary; between boundaries only count.

        Raises:
            NonFiniteGradientError: on all ranks alike, before any weight is changed.
        """
        for group in self._sgd.param_groups:
            group["lr"] = lr
        self._engine.step()

    def grad_norm(self) -> float:
        """Norm of the last averaged gradient before clipping; NaN where DeepSpeed does not form it."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict of the backbone in fp32 on the CPU; a collective, batch-norm statistics averaged."""
        import deepspeed

        self._average_statistics()
        # Under stage 3 every rank holds a slice, of the frozen parameters too; elsewhere this gathers nothing.
        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), enabled=self._stage == 3):
            state = self.module.state_dict()
            return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}

    def _average_statistics(self) -> None:
        """Give every rank the mean of the running statistics: the run goes on from what a resume would load."""
        ranks = distributed.get_world_size()
        if ranks == 1:
            return
        for name, value in self.module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.copy_(all_reduce(value.clone()) / ranks)

    def momentum(self) -> dict[str, Tensor]:
        """Momentum of every trained parameter, whole, fp32 on the CPU; a collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 0:
            found = {name: self._sgd.state[p].get("momentum_buffer") for name, p in self._trained.items()}
        else:
            found = {name: safe_get_full_optimizer_state(p, "momentum_buffer") for name, p in self._trained.items()}
        return {
            name: (torch.zeros_like(self._trained[name]) if value is None else value).detach().to("cpu", copy=True)
            for name, value in found.items()
        }

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Set the momentum of every trained parameter.

        Raises:
            ConfigError: ZeRO stage 3, whose partitions cannot be set whole.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        if self._stage == 3:
            raise ConfigError("Resuming with engine.zero_stage = 3 is not supported; resume with stage 0, 1 or 2.")
        if self._stage in (1, 2):
            # DeepSpeed ties parameters to their optimiser state at the first step; here it is wanted before.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained.items():
            value = momentum[name].to(parameter.device)
            if self._stage == 0:
                self._sgd.state[parameter]["momentum_buffer"] = value.clone()
            else:
                safe_set_full_optimizer_state(parameter, value, "momentum_buffer")
