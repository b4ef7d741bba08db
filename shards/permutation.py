"""Keyed permutations of [0, n) that are evaluated, not stored: position to sample in constant memory.

A balanced Feistel network permutes the next even power of two; results outside [0, n) are walked on until they fall
inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), in fewer than four
rounds on average.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["key_of", "mix", "permute", "permute_each"]

_ROUNDS = 6
_ROUND_CONSTANTS = np.frombuffer(hashlib.blake2b(b"aroface rounds", digest_size=8 * _ROUNDS).digest(), "<u8")


def permute(positions: NDArray[np.int64], *, size: int, seed: int, epoch: int, purpose: str = "") -> NDArray[np.int64]:
    """Images of `positions` under the permutation of [0, size) that (seed, epoch, purpose) selects.

    Args:
        positions: (K,) integers in [0, size).
        size: n, at least 1.
        seed: selects the family; any non-negative integer.
        epoch: selects the member; any non-negative integer.
        purpose: keeps permutations apart that are drawn for different things.

    Returns:
        (K,) int64, a bijection of [0, size) over all positions.
    """
    text = f"aroface order {seed} {epoch}{purpose and f' {purpose}'}"
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    values = positions.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        values[pending] = _feistel(values[pending], shift, mask, np.frombuffer(digest, "<u8"))
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


def permute_each(positions: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images of positions under permutations of their own: element i under that of [0, sizes[i]) which keys[i] selects.

    Args:
        positions: (K,) with positions[i] in [0, sizes[i]).
        sizes: (K,) at least 1.
        keys: (K,) from `key_of` and `mix`.
    """
    half_bits = np.maximum(1, (np.ceil(np.log2(np.maximum(sizes, 2))).astype(np.uint64) + np.uint64(1)) // np.uint64(2))
    masks = (np.uint64(1) << half_bits) - np.uint64(1)
    values, bounds = positions.astype(np.uint64), sizes.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        rounds = [mix(keys[pending] ^ constant) for constant in _ROUND_CONSTANTS]
        values[pending] = _feistel(values[pending], half_bits[pending], masks[pending], rounds)
        pending = pending[values[pending] >= bounds[pending]]
    return values.astype(np.int64)


def key_of(*parts: int | str) -> np.uint64:
    """64 bits that depend on every part."""
    digest = hashlib.blake2b(" ".join(map(str, ("aroface key", *parts))).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _feistel(
    values: NDArray[np.uint64],
    shift: NDArray[np.uint64] | np.uint64,
    mask: NDArray[np.uint64] | np.uint64,
    keys: NDArray[np.uint64] | list[NDArray[np.uint64]],
) -> NDArray[np.uint64]:
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit finaliser with full avalanche (the constants of SplitMix64; Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
