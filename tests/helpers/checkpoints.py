"""Small checkpoints in the canonical layout, with weights and statistics as if they had been trained."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from aroface.config.schema import TrainConfig
from aroface.contract import ColourOrder, InputContract
from aroface.engine.checkpoint_layout import BACKBONE_FILE, finish_checkpoint, start_checkpoint, write_state
from aroface.inference import TrainedModel
from aroface.models import IResNet, build_backbone

IMAGE_SIZE = 32


def tiny_config(colour_order: ColourOrder = "rgb") -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "seed": 0,
            "model": {"kind": "iresnet", "depth": 18, "embedding_dim": 16, "image_size": IMAGE_SIZE, "width": 0.125},
            "head": {"kind": "arcface", "margin": 0.5},
            "alignment": {"kind": "none"},
            "data": {"shards": "unused", "colour_order": colour_order},
            "batch": {"global_batch": 8},
            "optim": {},
            "schedule": {"epochs": 1.0},
        }
    )


def tiny_model(colour_order: ColourOrder = "rgb") -> TrainedModel:
    config = tiny_config(colour_order)
    contract = InputContract(image_size=IMAGE_SIZE, colour_order=colour_order, mean=120.0, std=128.0)
    return TrainedModel(tiny_backbone(config), contract, "iresnet18-w0.125", "0" * 64)


def tiny_backbone(config: TrainConfig) -> IResNet:
    """Random weights; batch norms with statistics and scales of their own, so that folding them can go wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config.model)
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0.0, 0.2)
                torch.nn.init.normal_(module.running_mean, 0.0, 0.2)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return backbone.eval()


def write_checkpoint(run: Path, colour_order: ColourOrder = "rgb", *, step: int = 7) -> Path:
    """Write what inference reads of a checkpoint; returns its step directory."""
    config = tiny_config(colour_order)
    contract = InputContract(image_size=IMAGE_SIZE, colour_order=colour_order)
    temporary = start_checkpoint(run, step)
    save_file(tiny_backbone(config).state_dict(), temporary / BACKBONE_FILE)
    state = {"step": step, "config": config.model_dump(mode="json"), "contract": contract.model_dump()}
    write_state(temporary, state)
    return finish_checkpoint(temporary, run, step)
