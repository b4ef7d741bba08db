# mypy: ignore-errors
# Kernels are written in Triton's language, which only looks like Python.
"""GPU kernels of the fused softmax: tiles of logits live in registers and are never written.

No atomics: results do not depend on the order in which programs run.
"""

import triton
import triton.language as tl

__all__ = ["row_shares", "row_terms"]


@triton.jit
def _load(start, rows, num_rows, columns, dim):
    """(rows, columns) numbers of a row-major (num_rows, dim) matrix, 0 outside of it."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < dim)
    return tl.load(start + rows[:, None].to(tl.int64) * dim + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(
    embeddings, centres, inverse_lengths, row, classes, own, num_rows, num_classes, dim, scale,
    tile_rows: tl.constexpr, tile_classes: tl.constexpr, tile_dim: tl.constexpr,
):  # fmt: skip
    """(rows, classes) scale x cos; -inf where the class is the row's own or does not exist.

    The centres are rounded to the type of the embeddings; their lengths are divided out of the sums.
    """
    sums = tl.zeros((tile_rows, tile_classes), tl.float32)
    for first in range(0, dim, tile_dim):
        columns = first + tl.arange(0, tile_dim)
        left = _load(embeddings, row, num_rows, columns, dim)
        right = _load(centres, classes, num_classes, columns, dim).to(left.dtype)
        # tf32x3: fp32 from three products of tensor cores; without effect on bf16
        sums = tl.dot(left, tl.trans(right), sums, input_precision="tf32x3")
    inverse = tl.load(inverse_lengths + classes, mask=classes < num_classes, other=0.0)
    is_negative = (classes[None, :] < num_classes) & (classes[None, :] != own[:, None])
    return tl.where(is_negative, sums * (scale * inverse)[None, :], -float("inf"))


@triton.jit
def row_terms(
    embeddings, centres, inverse_lengths, targets, result, num_rows, num_classes, dim, per_split, scale,
    tile_rows: tl.constexpr, tile_classes: tl.constexpr, tile_dim: tl.constexpr,
):  # fmt: skip
    """result[split, i] = log sum exp(scale cos_ij) over the negatives j of one split of the classes."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    split = tl.program_id(1)
    own = tl.load(targets + row, mask=row < num_rows, other=-1)
    largest = tl.full((tile_rows,), -float("inf"), tl.float32)
    total = tl.zeros((tile_rows,), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, num_classes), tile_classes):
        classes = first + tl.arange(0, tile_classes)
        logits = _logits(
            embeddings, centres, inverse_lengths, row, classes, own, num_rows, num_classes, dim, scale,
            tile_rows, tile_classes, tile_dim,
        )  # fmt: skip
        now = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(now == -float("inf"), 0.0, now)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        largest = now
    is_empty = total == 0
    value = tl.where(is_empty, -float("inf"), tl.log(tl.where(is_empty, 1.0, total)) + largest)
    tl.store(result + split * num_rows + row, value, mask=row < num_rows)


@triton.jit
def row_shares(
    embeddings, centres, inverse_lengths, targets, totals, result, num_rows, num_classes, dim, scale,
    tile_rows: tl.constexpr, tile_classes: tl.constexpr, tile_dim: tl.constexpr,
):  # fmt: skip
    """result[i, j] = exp(scale cos_ij - total_i) for the negatives j of a chunk, 0 at the row's own class."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    classes = tl.program_id(1) * tile_classes + tl.arange(0, tile_classes)
    own = tl.load(targets + row, mask=row < num_rows, other=-1)
    total = tl.load(totals + row, mask=row < num_rows, other=0.0)
    logits = _logits(
        embeddings, centres, inverse_lengths, row, classes, own, num_rows, num_classes, dim, scale,
        tile_rows, tile_classes, tile_dim,
    )  # fmt: skip
    place = result + row[:, None].to(tl.int64) * num_classes + classes[None, :]
    inside = (row[:, None] < num_rows) & (classes[None, :] < num_classes)
    tl.store(place, tl.exp(logits - total[:, None]).to(result.dtype.element_ty), mask=inside)
