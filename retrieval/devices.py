"""Names of devices, as commands take them: cpu, cuda for all GPUs, cuda:0, or cuda:0,1 for several."""

from aroface.errors import ConfigError

__all__ = ["DEVICE_NAMES", "gpu_numbers"]

#: What `--device` takes, for the help.
DEVICE_NAMES = "cpu, cuda, cuda:0 or cuda:0,1"


def gpu_numbers(device: str) -> list[int]:
    """Numbers of the GPUs of `cpu` (none), `cuda` (all), `cuda:0` or `cuda:0,2`.

    Raises:
        ConfigError: not such a name, or a GPU that PyTorch does not see.
    """
    if device == "cpu":
        return []
    name, _, numbers = device.partition(":")
    if name != "cuda" or not all(part.isdecimal() for part in numbers.split(",") if numbers):
        raise ConfigError(f"device {device!r} is unknown; write cpu, cuda, cuda:0, or cuda:0,1 for several.")
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = [int(part) for part in numbers.split(",")] if numbers else list(range(seen))
    if not chosen or max(chosen) >= seen:
        raise ConfigError(
            f"device {device}: PyTorch sees {seen} GPU(s) here. Install a build of PyTorch with CUDA on a machine with "
            "an NVIDIA GPU, or choose cpu."
        )
    return chosen
