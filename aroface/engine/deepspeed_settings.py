"""Typed settings to DeepSpeed's JSON: every setting that we decide is written out, further ones are checked by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from aroface.config.schema import TrainConfig
from aroface.engine.schedule import accumulation_steps
from aroface.errors import ConfigError

__all__ = ["deepspeed_settings"]

_OWNED_KEYS = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_allow_untested_optimizer", "torch_autocast", "bf16", "fp16", "optimizer", "scheduler"),
    }
)
#: What `engine.deepspeed_extra` may name. DeepSpeed itself accepts a misspelt top-level key in silence.
_EXTRA_KEYS = frozenset(
    {
        *("zero_optimization", "activation_checkpointing", "comms_logger", "communication_data_type", "compile"),
        *("dump_state", "flops_profiler", "memory_breakdown", "prescale_gradients", "gradient_predivide_factor"),
        *("sparse_gradients", "wall_clock_breakdown"),
    }
)
#: Inside zero_optimization: they take the gradients away from where they are checked and clipped.
_REFUSED_ZERO_KEYS = ("offload_optimizer", "offload_param", "zenflow")


def deepspeed_settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON, every setting that we decide written out.

    Raises:
        ConfigError: batch sizes that do not multiply out, a key in `engine.deepspeed_extra` that is unknown or ours, or
            `engine.compile` or `engine.cuda_graphs` where it cannot be.
    """
    accumulation = accumulation_steps(config, world_size)
    _check_compile(config)
    _check_graphs(config)
    settings: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.global_batch // (accumulation * world_size),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # the joint update clips
        "zero_optimization": _zero(config.engine.zero_stage),
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # It waits for the device before every forward pass and after every step, for a figure that nobody reads.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    for key, value in config.engine.deepspeed_extra.items():
        _check_extra(key)
        if key == "zero_optimization":
            settings[key].update(_checked_zero(value))
        else:
            settings[key] = value
    return settings


def _zero(stage: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        # A second norm, with a collective and a host synchronisation of its own: the joint update has it already.
        settings["compute_grad_norm"] = False
    return settings


def _check_compile(config: TrainConfig) -> None:
    if not config.engine.compile:
        return
    if config.engine.zero_stage == 3:
        raise ConfigError(
            "engine.compile: true does not go with engine.zero_stage = 3, whose weights come and go inside the forward "
            "pass; use stage 0, 1 or 2, or engine.compile: false."
        )
    if config.model.checkpoint_activations:
        raise ConfigError(
            "engine.compile: true does not go with model.checkpoint_activations: true; the compiler keeps fewer "
            "activations by itself. Set one of the two to false."
        )


def _check_graphs(config: TrainConfig) -> None:
    engine = config.engine
    if not engine.cuda_graphs:
        return
    for stands, what, do in (
        (engine.zero_stage == 3, "engine.zero_stage = 3, whose weights come and go", "use stage 0, 1 or 2"),
        (engine.batch_norm == "sync", "engine.batch_norm = sync, which talks to other ranks", "use local or frozen"),
        (engine.compile, "engine.compile: true, whose code has not been recorded yet", "set engine.compile: false"),
        (
            config.model.checkpoint_activations,
            "model.checkpoint_activations: true, whose second pass a graph cannot hold",
            "set model.checkpoint_activations: false",
        ),
    ):
        if stands:
            raise ConfigError(
                f"engine.cuda_graphs: true does not go with {what} inside a pass; {do}, or engine.cuda_graphs: false."
            )


def _checked_zero(value: Any) -> Mapping[str, Any]:
    name = "engine.deepspeed_extra.zero_optimization"
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} = {value!r} is not a group of settings; write {{zero_optimization: {{overlap_comm: false}}}}, "
            "or set engine.zero_stage for the stage."
        )
    if "stage" in value:
        raise ConfigError(f"{name}.stage is set by engine.zero_stage; use that.")
    refused = [key for key in _REFUSED_ZERO_KEYS if key in value]
    if refused:
        raise ConfigError(
            f"{name}.{refused[0]} is not supported: gradients are checked and clipped on the device. Leave it out; "
            "engine.zero_stage and model.checkpoint_activations save memory."
        )
    return value


def _check_extra(key: str) -> None:
    if key in _OWNED_KEYS:
        raise ConfigError(f"engine.deepspeed_extra.{key} is generated from the other settings; set those instead.")
    if key not in _EXTRA_KEYS:
        near = get_close_matches(key, _EXTRA_KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(_EXTRA_KEYS))}."
        raise ConfigError(f"engine.deepspeed_extra.{key} is not passed to DeepSpeed; {hint}")
