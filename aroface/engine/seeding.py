"""Random generators that are functions of (seed, purpose, step, rank): nothing to save, nothing to restore."""

import hashlib

import torch

__all__ = ["derive_generator", "derive_seed"]


def derive_seed(seed: int, purpose: str, *, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed; different for every combination, equal on every machine."""
    text = f"{seed}/{purpose}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def derive_generator(
    seed: int, purpose: str, *, step: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, step=step, rank=rank))
