"""Where bfloat16 is worth choosing: on devices that multiply it faster than float32.

Without units for it, PyTorch's products in bfloat16 are not merely no faster: on an AVX2 processor they were seen at a
tenth (convolutions) to an eightieth (matrix products) of the speed of float32.
"""

import logging
import platform
import sys
from functools import cache

__all__ = ["has_bf16_units", "warn_without_bf16_units"]

logger = logging.getLogger(__name__)


@cache
def has_bf16_units(device_type: str = "cpu") -> bool:
    """Whether this machine's devices of a type multiply bfloat16 faster than float32; of GPUs, the current one."""
    try:
        import torch  # takes seconds, and a search can do without
    except ImportError:
        return False
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if sys.platform != "linux" or device_type != "cpu":
        return False
    if platform.machine() == "aarch64":
        has_library: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return has_library and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def warn_without_bf16_units(setting: str, device_type: str, *, instead: str) -> None:
    """Say that bfloat16 was asked for where it is slow.

    Args:
        setting: by which it was asked for.
        device_type: where it would run.
        instead: what to do.
    """
    if not has_bf16_units(device_type):
        kind = "processor" if device_type == "cpu" else "device"
        logger.warning(
            "%s is slower than fp32, often many times: this %s has no units for it. %s", setting, kind, instead
        )
