"""A checkpoint as an embedder: images in, embeddings out, as the model was trained to see them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from aroface.bf16 import warn_without_bf16_units
from aroface.config.load import parse_config
from aroface.config.model import ModelSection
from aroface.config.schema import ModelConfig, TrainConfig
from aroface.contract import InputContract
from aroface.devices import own_device
from aroface.engine.checkpoint_layout import BACKBONE_FILE, STATE_FILE, read_state, resolve_checkpoint
from aroface.errors import CheckpointError
from aroface.files import sha256_of
from aroface.models import Backbone, build_backbone
from aroface.preprocess import normalise

__all__ = [
    "InferencePrecision",
    "TorchEmbedder",
    "TrainedModel",
    "load_embedder",
    "load_model",
    "read_description",
    "untrained_model",
]

InferencePrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainedModel:
    """A backbone in evaluation mode with what has to travel with it."""

    backbone: Backbone
    contract: InputContract
    name: str  #: such as `iresnet100`
    weights_sha256: str  #: of backbone.safetensors; `untrained` where there is none

    @property
    def model_id(self) -> str:
        """Short name and hash, for result files."""
        return f"{self.name}-{self.weights_sha256[:12]}"


class TorchEmbedder:
    """`aroface.types.Embedder` on PyTorch.

    Args:
        model: what to run; its backbone is moved to `device` and switched to evaluation mode.
        precision: `fp32`, or `bf16` for autocast (1.4 to 2.6 times faster on CPUs with AMX, cosine to fp32 > 0.9999).
        batch_size: largest batch that goes through the network at once; memory, not the result.
        device: where it runs; None takes the CUDA device of the local rank (the first without one), else the CPU.
    """

    def __init__(
        self,
        model: TrainedModel,
        *,
        precision: InferencePrecision = "fp32",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        self._device = torch.device(device or own_device())
        self._model = model
        self._backbone = model.backbone.to(self._device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._precision = precision
        if precision == "bf16":
            warn_without_bf16_units("precision bf16", self._device.type, instead="Use fp32.")
        self._batch_size = batch_size

    @property
    def contract(self) -> InputContract:
        """What the model expects; `embed` applies it."""
        return self._model.contract

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self._model.backbone.embedding_dim

    @property
    def model_id(self) -> str:
        """Short name and hash of the weights."""
        return self._model.model_id

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 RGB to (B, D) float32, un-normalised."""
        self.contract.check_images(images)
        embeddings = np.empty((len(images), self.embedding_dim), np.float32)
        with torch.inference_mode(), self._autocast():
            for start in range(0, len(images), self._batch_size):
                part = np.ascontiguousarray(images[start : start + self._batch_size])
                pixels = normalise(torch.from_numpy(part).to(self._device), self.contract)
                embeddings[start : start + len(part)] = self._backbone(pixels).float().cpu().numpy()
        return embeddings

    def _autocast(self) -> AbstractContextManager[object]:
        enabled = self._precision == "bf16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)


def load_embedder(
    path: Path, *, precision: InferencePrecision = "fp32", batch_size: int = 64, device: str | None = None
) -> TorchEmbedder:
    """The model of a run directory (its newest checkpoint) or of one checkpoint.

    Raises:
        CheckpointError: no whole checkpoint there, or its parts do not belong together.
    """
    return TorchEmbedder(load_model(path), precision=precision, batch_size=batch_size, device=device)


def load_model(path: Path) -> TrainedModel:
    """Backbone, contract and hash of a checkpoint or of a model.safetensors, on the CPU and in evaluation mode.

    Args:
        path: run directory, step directory, best.json of a run, or a model.safetensors by itself.

    Raises:
        CheckpointError: no whole checkpoint there, or its parts do not belong together.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return _load_file(path)
    directory = resolve_checkpoint(path)
    config, contract = read_description(directory)
    backbone = build_backbone(config)
    weights = directory / BACKBONE_FILE
    try:
        backbone.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{weights} does not hold the weights of the {config.kind} in its state.json ({error}). "
            "Take a checkpoint that training wrote, and do not mix files of two checkpoints."
        ) from error
    return TrainedModel(backbone.eval(), contract, config.name, sha256_of(weights))


def _load_file(path: Path) -> TrainedModel:
    """A file that carries network and contract in its metadata; nothing vouches for its bytes."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        config = TypeAdapter[ModelConfig](ModelConfig).validate_json(metadata["model"])
        contract = InputContract.model_validate_json(metadata["contract"])
        backbone = build_backbone(config)
        backbone.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, ValidationError, RuntimeError) as error:
        reason = f"its metadata lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} is no model by itself: {reason}. Take the model.safetensors of a checkpoint that `aroface train` "
            "wrote, or name the checkpoint's directory."
        ) from error
    return TrainedModel(backbone.eval(), contract, config.name, sha256_of(path))


def untrained_model(path: Path, *, seed: int = 0) -> TrainedModel:
    """The network of a checkpoint with fresh weights: what training is compared with.

    Torch's global generator is left as it was.
    """
    config, contract = read_description(resolve_checkpoint(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(config)
    return TrainedModel(backbone.eval(), contract, config.name, "untrained")


def read_description(directory: Path) -> tuple[ModelConfig, InputContract]:
    """Backbone settings and input contract of a checkpoint, trained here or imported.

    Raises:
        CheckpointError: its state.json lacks them or contradicts itself.
    """
    state = read_state(directory)
    missing = [] if "contract" in state else ["contract"]
    if "config" not in state and "model" not in state:
        missing.append("config")
    if missing:
        raise CheckpointError(
            f"{directory / STATE_FILE} lacks {' and '.join(missing)}; take a checkpoint that `aroface train` or "
            "`aroface import` wrote."
        )
    name = str(directory / STATE_FILE)
    if "config" in state:
        config = parse_config(state["config"], TrainConfig, name=f"{name}, config").model
    else:
        config = parse_config({"model": state["model"]}, ModelSection, name=name).model
    try:
        contract = InputContract.model_validate(state["contract"])
    except ValidationError as error:
        raise CheckpointError(f"{directory / STATE_FILE}, contract: {error}") from error
    if contract.image_size != config.image_size:
        raise CheckpointError(
            f"{directory / STATE_FILE} contradicts itself: contract.image_size = {contract.image_size}, "
            f"config.model.image_size = {config.image_size}. Take a checkpoint that `aroface train` wrote."
        )
    return config, contract
