"""The softmax over the local classes in fused GPU kernels: the logits are never written, only summed.

Chunks on a GPU write and read their (N, K) logits about eight times in each direction. Here a tile of logits lives and
dies in registers. Both passes go through the classes chunk by chunk: one kernel reads the centres and writes them at
unit length in the type of the products, into a buffer. From there the forward pass keeps the log-sum-exp of every row,
and the backward pass forms the tiles again and leaves the softmax of the chunk for the two products that follow. There
are as many products as with chunks, and nothing grows with the classes but their gradient (and one number a row for
each split of a chunk).

Legend: N rows of the global batch, C local classes, D embedding dimension, K classes of a chunk.
"""

import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aroface.config.head import HeadConfig
from aroface.errors import ConfigError
from aroface.heads.products import operand, product
from aroface.heads.softmax import MIN_LENGTH, SoftmaxSettings, add_target_gradient, target_cosines
from aroface.triton_runtime import is_interpreted, multiprocessors

__all__ = ["check_fused", "fused_chunk", "fused_terms", "is_fused_faster"]


class _Tiles(NamedTuple):
    """Sizes of a tile of logits and of a strip of its factors, and how a kernel runs."""

    rows: int
    classes: int
    dim: int
    stages: int  #: strips in shared memory at one time
    warps: int
    programs: int  #: on a multiprocessor at one time
    described: bool  #: factors through tensor descriptors


#: Hopper and data-centre Blackwell (compute capability 9 and 10): 228 KiB of shared memory, a copy engine
_NEW_TILES = {"fp32": _Tiles(128, 128, 32, 3, 8, 1, True), "bf16": _Tiles(128, 256, 64, 4, 8, 1, True)}
_TILES = {"fp32": _Tiles(64, 64, 32, 3, 8, 2, False), "bf16": _Tiles(128, 128, 64, 3, 8, 2, False)}
#: Numbers of a chunk of centres and of its softmax: 192 MiB in bf16. Chunks that fit into the second-level cache are no
#: faster on the GPU, and four times as many launches for the host.
_CHUNK_NUMBERS = 96 * 2**20
#: A chunk of the forward pass has no softmax, and is longer by this factor.
_FORWARD = 2
#: Numbers of centres that one program of a streaming kernel holds in its registers.
_STREAMED = 4096
_LOG2_E = math.log2(math.e)


def check_fused(config: HeadConfig) -> None:
    """Refuse what the fused kernels cannot do, before anything is built.

    Raises:
        ConfigError: no GPU, no Triton, or a head that changes its negatives.
    """
    use = "set head.implementation: auto"
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "head.implementation = triton needs the package triton, which comes with PyTorch for CUDA on Linux; "
            f"install that build, or {use}."
        )
    if not torch.cuda.is_available() and not is_interpreted():
        raise ConfigError(f"head.implementation = triton needs an NVIDIA GPU and this machine has none; {use}.")
    if config.kind == "curricularface" or config.interclass_filter is not None:
        what = "kind = curricularface" if config.kind == "curricularface" else "interclass_filter"
        raise ConfigError(
            f"head.implementation = triton leaves the negatives as they are, and head.{what} changes them; {use}."
        )


def is_fused_faster(config: HeadConfig, device: torch.device) -> bool:
    """Whether the kernels can be had there and were faster than chunks (docs/results/h200.md).

    In fp32 that is so on new GPUs; the tiles that others have room for were slower there.
    """
    if device.type != "cuda" or not (config.logit_precision == "bf16" or _is_new(device)):
        return False
    try:
        check_fused(config)
    except ConfigError:
        return False
    return True


def fused_chunk(rows: int, dim: int) -> int:
    """Classes of a chunk that is worth its launches and small beside the centres, for so many rows."""
    return max(1024, _CHUNK_NUMBERS // (rows + dim) // 1024 * 1024)


def fused_terms(
    embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings
) -> tuple[Tensor, Tensor]:
    """`aroface.heads.softmax.class_terms` without writing logits; `settings.rule` must be None."""
    terms: tuple[Tensor, Tensor] = _FusedTerms.apply(  # type: ignore[no-untyped-call]
        embeddings, weights, targets, settings
    )
    return terms


class _FusedTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings
    ) -> tuple[Tensor, Tensor]:
        weights = weights.contiguous()
        total = _totals(embeddings, weights, targets, settings)
        ctx.save_for_backward(embeddings, weights, targets, total)
        ctx.settings = settings
        return total, target_cosines(embeddings, weights, targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        # A caller may form gradients inside of autocast too, whose products would be those of half precision.
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return *_FusedTerms._gradients(ctx, *grad_outputs), None, None

    @staticmethod
    def _gradients(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings, weights, targets, total = ctx.saved_tensors
        settings: SoftmaxSettings = ctx.settings
        # Rows without a single negative have the value -inf and no gradient.
        is_empty = total == -torch.inf
        factor = (grad_outputs[0] * settings.logit_scale).masked_fill(is_empty, 0)[:, None]
        total = total.masked_fill(is_empty, 0) * _LOG2_E
        weighted = operand(embeddings * factor, settings.precision)
        grad_embeddings = torch.zeros_like(embeddings)
        grad_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        chunks = _Chunks(embeddings, weights, targets, settings, settings.chunk_classes)
        shares = chunks.rows.new_empty((len(embeddings), len(chunks.unit)))
        for start in range(0, len(weights), settings.chunk_classes):
            centres = weights[start : start + settings.chunk_classes]
            chunks.load(centres)
            padded = chunks.shares(start, len(centres), total, out=shares)
            grad_embeddings += product(shares[:, :padded], chunks.unit[:padded, : embeddings.shape[1]])
            if grad_weights is not None:
                gradient = grad_weights[start : start + len(centres)]
                product(shares[:, : len(centres)].T, weighted, out=gradient)
                _through_length(gradient, centres)
        grad_embeddings *= factor
        add_target_gradient(embeddings, weights, targets, grad_outputs[1], grad_embeddings, grad_weights)
        return grad_embeddings, grad_weights


def _totals(embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings) -> Tensor:
    """log-sum-exp of the negatives, (N,)."""
    size = _FORWARD * settings.chunk_classes
    chunks = _Chunks(embeddings, weights, targets, settings, size)
    partial = []
    for start in range(0, len(weights), size):
        centres = weights[start : start + size]
        chunks.load(centres)
        partial.append(chunks.terms(start, len(centres)))
    return torch.cat(partial).logsumexp(0)


class _Chunks:
    """Padded factors of the logits: all rows, and one chunk of centres at a time.

    Logits are in units of ln 2, for the hardware knows powers of two: the rows are multiplied by s log2(e).
    """

    def __init__(
        self, embeddings: Tensor, weights: Tensor, targets: Tensor, settings: SoftmaxSettings, size: int
    ) -> None:
        self.tiles = _tiles(settings.precision, embeddings.device)
        self.targets = targets
        self.count, dim = embeddings.shape
        width = _padded(dim, self.tiles.dim)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.rows = embeddings.new_zeros((_padded(self.count, self.tiles.rows), width), dtype=dtype)
        self.rows[: self.count, :dim] = embeddings * (settings.logit_scale * _LOG2_E)
        #: (K, D) the chunk at unit length
        self.unit = self.rows.new_empty((_padded(min(size, len(weights)), self.tiles.classes), width))
        strips = (self.rows, self.tiles.rows), (self.unit, self.tiles.classes)
        self._factors = [self._described(matrix, size, self.tiles.dim) for matrix, size in strips]

    def load(self, centres: Tensor) -> None:
        """Take the next chunk, (K, D) float32 of any length."""
        from aroface.heads import fused_kernels

        padded = _padded(len(centres), self.tiles.classes), self.unit.shape[1]
        block, grid = _streaming(*padded)
        fused_kernels.unit_centres[grid](
            centres, self.unit, *centres.shape, *padded, MIN_LENGTH, **block, num_warps=4
        )  # fmt: skip

    def terms(self, start: int, count: int) -> Tensor:
        """log-sum-exp of the negatives in each split of the loaded chunk, whose first class is `start`, (splits, N)."""
        from aroface.heads import fused_kernels

        tiles = self.tiles
        row_tiles, class_tiles = len(self.rows) // tiles.rows, -(-count // tiles.classes)
        # The classes are split until every multiprocessor is full.
        wanted = max(1, tiles.programs * multiprocessors(self.rows.device) // row_tiles)
        tiles_of_split = -(-class_tiles // min(class_tiles, wanted))
        splits = -(-class_tiles // tiles_of_split)
        partial = self.rows.new_empty((splits, self.count), dtype=torch.float32)
        fused_kernels.row_terms[(row_tiles, splits)](
            *self._factors, self.targets, partial,
            self.count, count, start, tiles_of_split * tiles.classes, **self._options(),
        )  # fmt: skip
        return partial

    def shares(self, start: int, count: int, totals: Tensor, *, out: Tensor) -> int:
        """Softmax of the loaded chunk over all negatives, into (N, K); returns how many columns, with padding of 0.

        `totals` is the log-sum-exp of every row in units of ln 2.
        """
        from aroface.heads import fused_kernels

        tiles = self.tiles
        class_tiles = -(-count // tiles.classes)
        fused_kernels.row_shares[(len(self.rows) // tiles.rows, class_tiles)](
            *self._factors, self.targets, totals, self._described(out, tiles.rows, tiles.classes),
            self.count, count, start, out.stride(0), **self._options(),
        )  # fmt: skip
        return class_tiles * tiles.classes

    def _described(self, matrix: Tensor, rows: int, columns: int) -> Any:
        from aroface.heads import fused_kernels

        return fused_kernels.describe(matrix, rows, columns) if self.tiles.described else matrix

    def _options(self) -> dict[str, int | bool]:
        tiles = self.tiles
        sizes = {"tile_rows": tiles.rows, "tile_classes": tiles.classes, "tile_dim": tiles.dim}
        how = {"padded_dim": self.rows.shape[1], "described": tiles.described}
        return {**sizes, **how, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _tiles(precision: str, device: torch.device) -> _Tiles:
    return (_NEW_TILES if _is_new(device) else _TILES)[precision]


def _is_new(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _through_length(gradient: Tensor, centres: Tensor) -> None:
    """`aroface.heads.softmax.through_length` in the place of the gradient, in one pass."""
    from aroface.heads import fused_kernels

    block, grid = _streaming(*centres.shape)
    fused_kernels.through_length[grid](gradient, centres, *centres.shape, MIN_LENGTH, **block, num_warps=4)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _streaming(count: int, dim: int) -> tuple[dict[str, int], tuple[int]]:
    """Rows of a program that reads whole rows of (count, dim), and how many programs there are."""
    block_dim = 1 << (dim - 1).bit_length()
    tile = max(1, _STREAMED // block_dim)
    return {"tile_classes": tile, "block_dim": block_dim}, (-(-count // tile),)
