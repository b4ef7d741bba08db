"""The softmax over the local classes in fused GPU kernels: the logits are never written, only summed.

Chunks on a GPU write and read their (N, K) logits about eight times in each direction. Here a tile of logits lives and
dies in registers: the forward pass keeps a running log-sum-exp of every row, and the backward pass forms the tiles
again and leaves the softmax of one chunk, in the type of the products, for the two products that follow. There are as
many products as with chunks, and as little memory: nothing grows with the classes but their gradient and lengths.

Legend: N rows of the global batch, C local classes, D embedding dimension, K classes of a chunk.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aroface.config.head import HeadConfig
from aroface.errors import ConfigError
from aroface.heads.products import operand, product
from aroface.heads.softmax import MIN_LENGTH, SoftmaxSettings, add_target_gradient, target_cosines, through_length
from aroface.triton_runtime import is_interpreted, multiprocessors

__all__ = ["check_fused", "fused_terms", "is_fused_faster"]


class _Tiles(NamedTuple):
    """Sizes of a tile of logits, and of the strip of the embeddings that is in shared memory at one time."""

    rows: int
    classes: int
    dim: int
    warps: int


_TILES = {"fp32": _Tiles(64, 64, 32, 8), "bf16": _Tiles(128, 128, 64, 8)}


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
    """Whether the kernels can be had there and were faster than chunks: in bf16 (docs/results/h200.md)."""
    if device.type != "cuda" or config.logit_precision != "bf16":
        return False
    try:
        check_fused(config)
    except ConfigError:
        return False
    return True


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
        lengths = weights.norm(dim=1).clamp_min_(MIN_LENGTH)
        total = _totals(embeddings, weights, lengths, targets, settings)
        ctx.save_for_backward(embeddings, weights, lengths, targets, total)
        ctx.settings = settings
        return total, target_cosines(embeddings, weights, targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        embeddings, weights, lengths, targets, total = ctx.saved_tensors
        settings: SoftmaxSettings = ctx.settings
        # Rows without a single negative have the value -inf and no gradient.
        is_empty = total == -torch.inf
        factor = (grad_outputs[0] * settings.logit_scale).masked_fill(is_empty, 0)[:, None]
        total = total.masked_fill(is_empty, 0)
        rows, weighted = (operand(e, settings.precision).contiguous() for e in (embeddings, embeddings * factor))
        grad_embeddings = torch.zeros_like(embeddings)
        grad_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weights), settings.chunk_classes):
            chunk = slice(start, start + settings.chunk_classes)
            shares = _shares(rows, weights[chunk], lengths[chunk], targets - start, total, settings)
            unit = weights[chunk] / lengths[chunk, None]
            grad_embeddings += product(shares, operand(unit, settings.precision))
            if grad_weights is not None:
                through_length(product(shares.T, weighted), unit, lengths[chunk, None], out=grad_weights[chunk])
        grad_embeddings *= factor
        add_target_gradient(embeddings, weights, targets, grad_outputs[1], grad_embeddings, grad_weights)
        return grad_embeddings, grad_weights, None, None


def _totals(embeddings: Tensor, weights: Tensor, lengths: Tensor, targets: Tensor, settings: SoftmaxSettings) -> Tensor:
    """log-sum-exp of the negatives, (N,)."""
    from aroface.heads import fused_kernels

    tiles = _TILES[settings.precision]
    row_tiles, class_tiles = -(-len(embeddings) // tiles.rows), -(-len(weights) // tiles.classes)
    # Few rows are few programs: the classes are split until every multiprocessor has two.
    wanted = max(1, 2 * multiprocessors(weights.device) // row_tiles)
    tiles_of_split = -(-class_tiles // min(class_tiles, wanted))
    splits = -(-class_tiles // tiles_of_split)
    partial = embeddings.new_empty((splits, len(embeddings)))
    fused_kernels.row_terms[(row_tiles, splits)](
        operand(embeddings, settings.precision).contiguous(), weights, lengths.reciprocal(), targets, partial,
        len(embeddings), *weights.shape, tiles_of_split * tiles.classes, settings.logit_scale, **_options(tiles),
    )  # fmt: skip
    return partial.logsumexp(0)


def _shares(
    rows: Tensor, weights: Tensor, lengths: Tensor, targets: Tensor, totals: Tensor, settings: SoftmaxSettings
) -> Tensor:
    """Softmax of a chunk over all negatives, (N, K) in the type of `rows`."""
    from aroface.heads import fused_kernels

    tiles = _TILES[settings.precision]
    shares = rows.new_empty((len(rows), len(weights)))
    fused_kernels.row_shares[(-(-len(rows) // tiles.rows), -(-len(weights) // tiles.classes))](
        rows, weights, lengths.reciprocal(), targets, totals, shares,
        len(rows), *weights.shape, settings.logit_scale, **_options(tiles),
    )  # fmt: skip
    return shares


def _options(tiles: _Tiles) -> dict[str, int]:
    sizes = {"tile_rows": tiles.rows, "tile_classes": tiles.classes, "tile_dim": tiles.dim}
    return sizes | {"num_warps": tiles.warps, "num_stages": 3}
