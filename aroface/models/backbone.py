"""What all backbones have in common: the size of their input, and blocks that can be recomputed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aroface.errors import ShapeError

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Face crops (B, 3, S, S) to embeddings (B, D); the base of every network here.

    Args:
        embedding_dim: D, length of the embedding.
        image_size: S, side of the square input in pixels.
        smallest: least `image_size` that the network takes.
        checkpoint_activations: recompute the blocks in the backward pass; outputs, gradients and batch-norm statistics
            are the same.

    Raises:
        ShapeError: `image_size` is too small.
    """

    def __init__(self, *, embedding_dim: int, image_size: int, smallest: int, checkpoint_activations: bool) -> None:
        super().__init__()
        if image_size < smallest:
            raise ShapeError(
                f"model.image_size = {image_size} px is too small for {type(self).__name__}; "
                f"use {smallest} px or more (112 is the field's size)."
            )
        self.embedding_dim = embedding_dim
        self.image_size = image_size
        self.checkpoint_activations = checkpoint_activations

    def _check_images(self, images: Tensor) -> None:
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ShapeError(
                f"The backbone takes images (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}; "
                "set model.image_size or resize the faces."
            )

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block; where activations are checkpointed it is run again in the backward pass."""
        result: Tensor
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            result = checkpoint(block, x, use_reentrant=False, context_fn=lambda: _contexts(block))
        else:
            result = block(x)
        return result


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass and for its repetition."""
    return nullcontext(), _statistics_untouched(block)


@contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    """The second pass over the same batch must not enter the running statistics again."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(m, m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    try:
        for norm in norms:
            # Copies, not None: the repetition has to save as many tensors as the first pass did.
            norm.running_mean, norm.running_var, norm.num_batches_tracked = (
                None if value is None else value.clone()
                for value in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            )
        yield
    finally:
        for norm, mean, var, count in before:
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count
