"""Names of devices, as commands take them: cpu, cuda for all GPUs, cuda:0, or cuda:0,1 for several."""

from collections.abc import Callable

from aroface.errors import ConfigError

__all__ = ["DEVICE_NAMES", "gpu_numbers"]

#: What `--device` takes, for the help.
DEVICE_NAMES = "cpu, cuda, cuda:0 or cuda:0,1"


def gpu_numbers(device: str, available: Callable[[], int], *, library: str, remedy: str) -> list[int]:
    """Numbers of the GPUs of `cpu` (none), `cuda` (all), `cuda:0` or `cuda:0,2`.

    Args:
        device: name.
        available: counts the GPUs that the library sees; not called for `cpu`.
        library: that searches there.
        remedy: how to get a library that sees one.

    Raises:
        ConfigError: not such a name, or a GPU that the library does not see.
    """
    if device == "cpu":
        return []
    name, _, numbers = device.partition(":")
    if name != "cuda" or not all(part.isdecimal() for part in numbers.split(",") if numbers):
        raise ConfigError(f"device {device!r} is unknown; write cpu, cuda, cuda:0, or cuda:0,1 for several.")
    seen = available()
    chosen = [int(part) for part in numbers.split(",")] if numbers else list(range(seen))
    if not chosen or max(chosen) >= seen:
        raise ConfigError(
            f"device {device}: {library} sees {seen} GPU(s) here. {remedy} on a machine with an NVIDIA GPU, or choose "
            "cpu."
        )
    return chosen
