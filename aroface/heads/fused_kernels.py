# mypy: ignore-errors
# Kernels are written in Triton's language, which only looks like Python.
"""GPU kernels of the fused softmax: tiles of logits live in registers and are never written.

Factors of the tiles lie in padded buffers, whose rows and columns are whole tiles: the products need no masks. They are
read through tensor descriptors where the GPU has a copy engine for them, else through pointers. Their width is a
constant of the kernel: with a loop of unknown length ptxas puts the products one after the other. No atomics: results
do not depend on the order in which programs run.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["describe", "row_shares", "row_terms", "through_length", "unit_centres"]

_LN2 = tl.constexpr(0.6931471805599453)


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tensor descriptor of a row-major matrix, read or written in tiles of that size."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


@triton.jit(do_not_specialize=["num_classes"])
def unit_centres(
    centres, result, num_classes, dim, padded_classes, padded_dim, min_length,
    tile_classes: tl.constexpr, block_dim: tl.constexpr,
):  # fmt: skip
    """result[j] = centre j / max(its length, min_length) in the type of the result; zeros in what is padded."""
    classes = (tl.program_id(0) * tile_classes + tl.arange(0, tile_classes)).to(tl.int64)[:, None]
    columns = tl.arange(0, block_dim)[None, :]
    inside = (classes < num_classes) & (columns < dim)
    values = tl.load(centres + classes * dim + columns, mask=inside, other=0.0, eviction_policy="evict_first")
    lengths = tl.maximum(tl.sqrt(tl.sum(values * values, 1)), min_length)
    unit = (values / lengths[:, None]).to(result.dtype.element_ty)
    tl.store(result + classes * padded_dim + columns, unit, mask=(classes < padded_classes) & (columns < padded_dim))


@triton.jit
def _strip(
    matrix, first_row, column, rows: tl.constexpr, columns: tl.constexpr, width: tl.constexpr, described: tl.constexpr
):  # fmt: skip
    """(rows, columns) numbers of a padded matrix, given by a tensor descriptor or a pointer."""
    if described:
        numbers = matrix.load([first_row, column])
    else:
        row = (first_row + tl.arange(0, rows)).to(tl.int64)[:, None]
        numbers = tl.load(matrix + row * width + column + tl.arange(0, columns)[None, :])
    return numbers


@triton.jit
def _logits(
    rows, centres, first_row, first_class, own, num_classes, tile_rows: tl.constexpr, tile_classes: tl.constexpr,
    tile_dim: tl.constexpr, padded_dim: tl.constexpr, described: tl.constexpr,
):  # fmt: skip
    """(rows, classes) products; -inf where the class is the row's own or does not exist."""
    sums = tl.zeros((tile_rows, tile_classes), tl.float32)
    for column in range(0, padded_dim, tile_dim):
        left = _strip(rows, first_row, column, tile_rows, tile_dim, padded_dim, described)
        right = _strip(centres, first_class, column, tile_classes, tile_dim, padded_dim, described)
        # tf32x3: fp32 from three products of tensor cores; without effect on bf16
        sums = tl.dot(left, right.T, sums, input_precision="tf32x3")
    classes = first_class + tl.arange(0, tile_classes)[None, :]
    return tl.where((classes < num_classes) & (classes != own[:, None]), sums, -float("inf"))


@triton.jit(do_not_specialize=["num_classes"])
def row_terms(
    rows, centres, targets, result, num_rows, num_classes, chunk_start, per_split, tile_rows: tl.constexpr,
    tile_classes: tl.constexpr, tile_dim: tl.constexpr, padded_dim: tl.constexpr, described: tl.constexpr,
):  # fmt: skip
    """result[split, i] = log sum 2^(rows_i centres_j) over the negatives j of one split of a chunk of classes."""
    first_row = tl.program_id(0) * tile_rows
    row = first_row + tl.arange(0, tile_rows)
    split = tl.program_id(1)
    own = (tl.load(targets + row, mask=row < num_rows, other=-1) - chunk_start).to(tl.int32)
    largest = tl.full((tile_rows,), -float("inf"), tl.float32)
    total = tl.zeros((tile_rows,), tl.float32)
    stop = tl.minimum((split + 1) * per_split, num_classes)
    # flatten: strips of the next tile are on their way while the sums of this one are taken
    for first_class in tl.range(split * per_split, stop, tile_classes, flatten=True):
        logits = _logits(
            rows, centres, first_row, first_class, own, num_classes,
            tile_rows, tile_classes, tile_dim, padded_dim, described,
        )  # fmt: skip
        now = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(now == -float("inf"), 0.0, now)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        largest = now
    is_empty = total == 0
    value = tl.where(is_empty, -float("inf"), (tl.log2(tl.where(is_empty, 1.0, total)) + largest) * _LN2)
    tl.store(result + split * num_rows + row, value, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_classes"])
def row_shares(
    rows, centres, targets, totals, result, num_rows, num_classes, chunk_start, stride, tile_rows: tl.constexpr,
    tile_classes: tl.constexpr, tile_dim: tl.constexpr, padded_dim: tl.constexpr, described: tl.constexpr,
):  # fmt: skip
    """result[i, j] = 2^(rows_i centres_j - total_i) for the negatives j of a chunk; 0 elsewhere in the tile."""
    first_row = tl.program_id(0) * tile_rows
    first_class = tl.program_id(1) * tile_classes
    row = first_row + tl.arange(0, tile_rows)
    own = (tl.load(targets + row, mask=row < num_rows, other=-1) - chunk_start).to(tl.int32)
    total = tl.load(totals + row, mask=row < num_rows, other=0.0)
    logits = _logits(
        rows, centres, first_row, first_class, own, num_classes,
        tile_rows, tile_classes, tile_dim, padded_dim, described,
    )  # fmt: skip
    shares = tl.exp2(logits - total[:, None])
    if described:
        result.store([first_row, first_class], shares.to(result.dtype))
    else:
        column = first_class + tl.arange(0, tile_classes)[None, :]
        place = result + row[:, None].to(tl.int64) * stride + column
        tl.store(place, shares.to(result.dtype.element_ty), mask=row[:, None] < num_rows)


@triton.jit(do_not_specialize=["num_classes"])
def through_length(
    gradient, centres, num_classes, dim, min_length, tile_classes: tl.constexpr, block_dim: tl.constexpr
):
    """Gradient of centres from the gradient of the same at unit length, in its place."""
    classes = (tl.program_id(0) * tile_classes + tl.arange(0, tile_classes)).to(tl.int64)[:, None]
    columns = tl.arange(0, block_dim)[None, :]
    inside = (classes < num_classes) & (columns < dim)
    place = classes * dim + columns
    values = tl.load(centres + place, mask=inside, other=0.0, eviction_policy="evict_first")
    grad_unit = tl.load(gradient + place, mask=inside, other=0.0)
    lengths = tl.maximum(tl.sqrt(tl.sum(values * values, 1)), min_length)[:, None]
    unit = values / lengths
    radial = tl.sum(grad_unit * unit, 1)[:, None]
    tl.store(gradient + place, (grad_unit - unit * radial) / lengths, mask=inside)
