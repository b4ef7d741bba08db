"""The classifier: classes in contiguous ranges over ranks, softmax over all of them, sampled if wanted.

Every rank sees the embeddings of the global batch and the centres of its own classes. Three exchanges tie them
together: embeddings and labels are gathered, the terms of the softmax are summed, and the gradient of the embeddings is
summed back; CurricularFace needs the target cosines besides. Class centres never leave their rank. Partial FC:
arXiv:2203.15565.

Legend: B images of a rank, N of the global batch, D embedding dimension, C local classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from aroface.config.head import HeadConfig
from aroface.distributed import all_reduce, is_distributed
from aroface.engine.seeding import derive_generator
from aroface.errors import ConfigError
from aroface.heads.exchange import gather_batch, own_rows, sum_over_ranks
from aroface.heads.fused import check_fused, fused_chunk, fused_terms, is_fused_faster
from aroface.heads.kinds import build_kind
from aroface.heads.softmax import SoftmaxSettings, class_terms, plain_terms, target_cosines, unit_rows

__all__ = ["Reduction", "ShardedHead", "build_head", "class_range"]

Reduction = Literal["mean", "none"]

_TERMS = {"plain": plain_terms, "chunked": class_terms, "triton": fused_terms}
_INIT_STD = 0.01
_INIT_BLOCK = 4096
#: So many classes are one chunk, whose logits the backward pass finds again instead of computing them anew.
_ONE_CHUNK = 8192
#: Logits of 1,024 images by this many classes stay in the cache of a CPU core.
_CPU_CHUNK = 1024
#: Logits of a chunk on a GPU: enough work for each of the dozen kernels that a chunk takes.
_GPU_LOGITS = 2**24


def class_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First class and one past the last class of a rank; sizes differ by at most one.

    Raises:
        ConfigError: fewer classes than ranks.
    """
    if num_classes < world_size:
        raise ConfigError(
            f"{num_classes} classes cannot be shared out over {world_size} ranks; each needs one. Use fewer ranks."
        )
    size, rest = divmod(num_classes, world_size)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def _implementation(config: HeadConfig, device: torch.device) -> str:
    if config.implementation != "auto":
        return config.implementation
    return "triton" if is_fused_faster(config, device) else "chunked"


def build_head(
    config: HeadConfig, *, num_classes: int, embedding_dim: int, seed: int, rank: int = 0, world_size: int = 1
) -> "ShardedHead":
    """The head that `config` describes; its first weights depend on (seed, class), not on the number of ranks.

    Raises:
        ConfigError: fewer classes than ranks, or an implementation that this machine or this kind does not have.
    """
    return ShardedHead(
        config, num_classes=num_classes, embedding_dim=embedding_dim, seed=seed, rank=rank, world_size=world_size
    )


class ShardedHead(nn.Module):
    """Margin softmax loss over classes that are shared out over ranks.

    The gradient of `weight` is dense with `sample_rate` 1, otherwise a sparse tensor of the sampled rows.
    """

    def __init__(
        self, config: HeadConfig, *, num_classes: int, embedding_dim: int, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__()
        if config.implementation == "triton":
            check_fused(config)
        self.config = config
        self.num_classes = num_classes
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.class_range = class_range(num_classes, rank, world_size)
        self.weight = nn.Parameter(_initial_weights(*self.class_range, embedding_dim, seed))
        self.kind = build_kind(config)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        step: int,
        update_statistics: bool = True,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Mean loss over the global batch, the same scalar on every rank; or the loss of each image of this rank.

        Args:
            embeddings: (B, D) un-normalised; B is the same on all ranks.
            labels: (B,) int64 in [0, num_classes).
            step: optimiser step, selects the sampled negatives.
            update_statistics: False in the attack pass: running statistics and class centres are left alone, the
                centres get no gradient.
            reduction: `mean`, a scalar; `none`, (B,).

        The gradient of `embeddings` is multiplied by the number of ranks: the engine averages the backbone's gradients
        over ranks, and the loss is a global mean already. The mean of `none` has the same gradient.
        """
        losses = self.losses(embeddings, labels, step=step, update_statistics=update_statistics)
        return losses.mean() if reduction == "mean" else own_rows(losses)

    def losses(self, embeddings: Tensor, labels: Tensor, *, step: int, update_statistics: bool = True) -> Tensor:
        """Loss of every image of the global batch, (N,), in rank order. Arguments as `forward`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            gathered, targets = gather_batch(embeddings.float(), labels, gradient_scale=self.world_size)
            return self._losses(gathered, targets, step=step, is_training=update_statistics)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics by name, the same on every rank; they belong to a checkpoint."""
        return dict(self.kind.named_buffers())

    def gradient(self) -> Tensor | None:
        """The numbers of the gradient of `weight`: (C, D), or those of the sampled rows alone. A view, not a copy.

        For checks, norms and scaling; None before a backward pass.
        """
        gradient = self.weight.grad
        if gradient is None or not gradient.is_sparse:
            return gradient
        self.weight.grad = gradient.coalesce()
        return self.weight.grad.values()

    def _losses(self, embeddings: Tensor, labels: Tensor, *, step: int, is_training: bool) -> Tensor:
        start, stop = self.class_range
        is_mine = (labels >= start) & (labels < stop)
        weights, local = self._sample(torch.where(is_mine, labels - start, -1), step=step)
        if not is_training:
            weights = weights.detach()  # the adversary wants the gradient of the images alone
        unit, norms = unit_rows(embeddings), embeddings.norm(dim=1)
        with torch.no_grad():
            known = self._known_cosines(unit, weights, local) if self.kind.needs_target_cosines else norms[:0]
            if is_training:
                self.kind.update(norms, known)
            rule = self.kind.negatives(known)
        config = self.config
        name = _implementation(config, weights.device)
        auto = fused_chunk(*unit.shape) if name == "triton" else _chunk_classes(len(weights), len(unit), weights.device)
        settings = SoftmaxSettings(config.logit_scale, config.chunk_classes or auto, config.logit_precision, rule)
        negatives, cosines = _TERMS[name](unit, weights, local, settings)
        targets = torch.where(is_mine, config.logit_scale * self.kind.targets(cosines.clamp(-1, 1), norms), 0.0)
        extra = self.kind.regulariser(norms)
        if extra is not None:
            extra = torch.where(is_mine, extra, 0.0)
        return _combine(negatives, targets, extra, largest=config.logit_scale * (rule.largest if rule else 1.0))

    def _known_cosines(self, unit: Tensor, weights: Tensor, local: Tensor) -> Tensor:
        """Target cosines of the whole batch, (N,), on every rank."""
        return all_reduce(target_cosines(unit, weights, local)).clamp_(-1, 1)

    def _sample(self, local: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Centres that take part, and the targets as indices into them."""
        if self.config.sample_rate >= 1:
            return self.weight, local
        count = len(self.weight)
        generator = derive_generator(self.seed, "negatives", step=step, rank=self.rank, device=local.device)
        priority = torch.rand(count, generator=generator, device=local.device)
        # One place more, which -1 falls on: the class of another rank.
        priority = torch.cat([priority, priority.new_zeros(1)]).index_fill_(0, local, 2.0)[:-1]
        wanted = max(round(self.config.sample_rate * count), 1)
        if wanted < min(len(local), count):  # then there may be more positives than that: the host has to ask
            wanted = max(wanted, int((priority == 2).sum()))
        chosen = priority.topk(wanted).indices.sort().values
        place = torch.full((count + 1,), -1, dtype=torch.int64, device=local.device)
        place[chosen] = torch.arange(wanted, device=local.device)
        return nn.functional.embedding(chosen, self.weight, sparse=True), place[local]


def _chunk_classes(count: int, rows: int, device: torch.device) -> int:
    """Columns of a chunk that are fast: many on a GPU, which has to be kept busy, few on a CPU."""
    if device.type == "cpu":
        return _CPU_CHUNK if count > _ONE_CHUNK else _ONE_CHUNK
    return max(_ONE_CHUNK, _GPU_LOGITS // rows)


def _combine(negatives: Tensor, targets: Tensor, extra: Tensor | None, *, largest: float) -> Tensor:
    """Losses (N,) from the terms of this rank and those of the others.

    Args:
        negatives: log-sum-exp over the local negatives.
        targets: target logits, 0 where another rank has the class.
        extra: added to the loss, 0 where another rank has the class; None: nothing.
        largest: upper bound of the logits: exp(logit - largest) of ranks can be added as float64 without a maximum
            over ranks, for it is at least exp(-3 x 200).
    """
    if is_distributed():
        terms = [(negatives.double() - largest).exp(), targets.double()]
        summed = sum_over_ranks(torch.stack(terms if extra is None else [*terms, extra.double()]))
        negatives, targets = (summed[0].log() + largest).float(), summed[1].float()
        extra = None if extra is None else summed[2].float()
    losses = nn.functional.softplus(negatives - targets)
    return losses if extra is None else losses + extra


def _initial_weights(start: int, stop: int, dim: int, seed: int) -> Tensor:
    """Rows [start, stop) of a matrix that is drawn block by block, so that any range of it can be made alone."""
    weights = torch.empty(stop - start, dim)
    for block in range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK)):
        generator = derive_generator(seed, "class centres", step=block)
        rows = torch.randn(_INIT_BLOCK, dim, generator=generator) * _INIT_STD
        first = block * _INIT_BLOCK
        low, high = max(start, first), min(stop, first + _INIT_BLOCK)
        weights[low - start : high - start] = rows[low - first : high - first]
    return weights
