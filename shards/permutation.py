"""A keyed permutation of [0, n) that is evaluated, not stored: position to sample in constant memory.

A balanced Feistel network permutes the next even power of two; results outside [0, n) are walked on until they fall
inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), in fewer than four
rounds on average.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["permute"]

_ROUNDS = 6


def permute(positions: NDArray[np.int64], *, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Images of `positions` under the permutation of [0, size) that (seed, epoch) selects.

    Args:
        positions: (K,) integers in [0, size).
        size: n, at least 1.
        seed: selects the family; any non-negative integer.
        epoch: selects the member; any non-negative integer.

    Returns:
        (K,) int64, a bijection of [0, size) over all positions.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = positions.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        values[pending] = _feistel(values[pending], half_bits, keys)
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"aroface order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit finaliser with full avalanche (the constants of SplitMix64; Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
