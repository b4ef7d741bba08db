"""Tensors out of a file of somebody else, without running what else the file may hold.

PyTorch files are pickles, which can name any class or function to be called. They are read by PyTorch's restricted
unpickler; the few containers that the known trainers put beside their tensors become empty stand-ins of ours. A file
that names anything else is refused. safetensors files hold nothing but tensors.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from aroface.errors import CheckpointError, DataError

__all__ = ["read_tensors", "refuse_bad_numbers"]

#: Keys under which trainers keep the weights of the backbone, tried in this order.
_CONTAINERS = ("state_dict_backbone", "state_dict", "model_state_dict", "backbone", "model", "net")


class _Settings:
    """In the place of a dictionary with attributes: a plain dictionary."""

    def __new__(cls, *args: object) -> Any:
        return {}


class _Nothing:
    """In the place of an object that only describes a run: takes anything, keeps nothing."""

    def __new__(cls, *args: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forget it."""


_STAND_INS: list[Any] = [
    *(
        (_Settings, name)
        for name in (
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning.pytorch.utilities.parsing.AttributeDict",
            "lightning.fabric.utilities.data.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "easydict.EasyDict",
        )
    ),
    *(
        (_Nothing, name)
        for name in (
            "argparse.Namespace",
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        )
    ),
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a weight file, on the CPU, as they lie there.

    Args:
        path: `.safetensors`, or any file of `torch.save`.

    Raises:
        DataError: no such file, not one of these formats, no tensors in it, or a class in it that would have to run.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; name the weight file itself, such as model.pt or model.safetensors.")
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read as safetensors: {error}. Fetch the file again.") from error
        return tensors
    return _state_dict(_load(path), path)


def _load(path: Path) -> Any:
    try:
        with safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError) as error:
        offending = _offending(path, str(error))
        if offending:
            raise DataError(
                f"{path} holds objects of {', '.join(offending)} beside its tensors. To rebuild them their code would "
                "have to run, and a pickle can run anything, so aroface reads tensors only. If you trust the file, "
                "load it once where it was made and save the weights alone: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')."
            ) from error
        raise DataError(
            f"{path} is not a weight file that torch.save or safetensors wrote ({_reason(error)}). Fetch the file "
            "again; an ONNX or TorchScript file cannot be imported."
        ) from error


def _reason(error: Exception) -> str:
    """What PyTorch found wrong, without its advice to load the file unrestrictedly, which runs what the file says."""
    message = " ".join(str(error).split())
    found = message.partition("WeightsUnpickler error: ")[2] or message
    return re.split(r" ?(?:In PyTorch 2\.6|Check the documentation)", found)[0][:200] or "it ends too early"


def _offending(path: Path, message: str) -> list[str]:
    """The classes and functions that the restricted unpickler refused, with their modules."""
    try:
        with safe_globals(_STAND_INS):
            found = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file in the format before 1.6, or none at all: the message of the unpickler has the first one
        found = re.findall(r"GLOBAL (\S+)", message)
    return sorted(found)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        if not _is_state_dict(content):
            found = [key for key in _CONTAINERS if _is_state_dict(content.get(key))]
            content = content[found[0]] if found else content
        if _is_state_dict(content):
            return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    keys = f"the keys {', '.join(map(repr, list(content)[:8]))}" if isinstance(content, Mapping) else type(content)
    raise DataError(
        f"{path} holds {keys} and no state dict of a network; tensors by name are expected, alone or under one of "
        f"{', '.join(_CONTAINERS)}."
    )


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) and v.dim() > 0 for v in value.values())


def refuse_bad_numbers(name: str, value: Tensor, where: str) -> None:
    """Refuse a floating-point tensor that no network can compute with.

    Args:
        name: of the tensor; a variance must not be negative.
        value: floating point.
        where: file and tensor, for messages.

    Raises:
        CheckpointError: values that are not finite, or negative variances.
    """
    if not torch.isfinite(value).all():
        count = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"{where} holds {count} values that are not finite, of {value.numel()}. The training has diverged or the "
            "file is damaged; take an earlier checkpoint."
        )
    if name.endswith("running_var") and bool((value < 0).any()):
        raise CheckpointError(f"{where} holds negative variances. The file is damaged; take an earlier checkpoint.")
