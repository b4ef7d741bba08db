"""The classifier: classes in contiguous ranges over ranks, softmax over all of them, sampled if wanted.

Every rank sees the embeddings of the global batch and the centres of its own classes. Three small exchanges tie them
together: embeddings and labels are gathered, the local log-sum-exps and target logits are gathered, and the gradient of
the embeddings is summed back. Class centres never leave their rank. Partial FC: arXiv:2203.15565.

Legend: B images of a rank, N of the global batch, D embedding dimension, C local classes.
"""

import torch
from torch import Tensor, nn

from aroface.config.schema import AdaFaceConfig, HeadConfig
from aroface.distributed import all_gather_rows
from aroface.engine.seeding import derive_generator
from aroface.errors import ConfigError
from aroface.heads.margins import ada_margin, ada_scaler, arc_margin
from aroface.heads.softmax import gather_terms, negatives_logsumexp, unit_rows

__all__ = ["ShardedHead", "build_head", "class_range"]

_INIT_STD = 0.01
_INIT_BLOCK = 4096
#: AdaFace's starting point of the running norm statistics.
_NORM_MEAN, _NORM_STD = 20.0, 100.0


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


def build_head(
    config: HeadConfig, *, num_classes: int, embedding_dim: int, seed: int, rank: int = 0, world_size: int = 1
) -> "ShardedHead":
    """The head that `config` describes; its first weights depend on (seed, class), not on the number of ranks."""
    return ShardedHead(
        config, num_classes=num_classes, embedding_dim=embedding_dim, seed=seed, rank=rank, world_size=world_size
    )


class ShardedHead(nn.Module):
    """Margin softmax loss over classes that are shared out over ranks."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self, config: HeadConfig, *, num_classes: int, embedding_dim: int, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.class_range = class_range(num_classes, rank, world_size)
        self.weight = nn.Parameter(_initial_weights(*self.class_range, embedding_dim, seed))
        # Running statistics of the embedding norms, used by AdaFace alone but kept by every head: one layout.
        self.register_buffer("norm_mean", torch.tensor(_NORM_MEAN))
        self.register_buffer("norm_std", torch.tensor(_NORM_STD))
        #: Local classes that took part in the softmax since the last optimiser step; None stands for all.
        self.sampled: Tensor | None = None

    def forward(self, embeddings: Tensor, labels: Tensor, *, step: int, update_statistics: bool = True) -> Tensor:
        """Mean loss over the global batch, the same scalar on every rank.

        Args:
            embeddings: (B, D) un-normalised; B is the same on all ranks.
            labels: (B,) int64 in [0, num_classes).
            step: optimiser step, selects the sampled negatives.
            update_statistics: False in the attack pass: running statistics and sampled classes stay as they are.

        The gradient of `embeddings` is multiplied by the number of ranks: the engine averages the backbone's gradients
        over ranks, and the loss is a global mean already.
        """
        return self.losses(embeddings, labels, step=step, update_statistics=update_statistics).mean()

    def losses(self, embeddings: Tensor, labels: Tensor, *, step: int, update_statistics: bool = True) -> Tensor:
        """Loss of every image of the global batch, (N,), in rank order. Arguments as `forward`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            gathered = all_gather_rows(embeddings.float(), gradient_scale=self.world_size)
            targets = all_gather_rows(labels)
            norms = gathered.detach().norm(dim=1)
            if update_statistics:
                self._update_statistics(norms)
            return self._losses(unit_rows(gathered), norms, targets, step=step, is_training=update_statistics)

    def _losses(self, unit: Tensor, norms: Tensor, labels: Tensor, *, step: int, is_training: bool) -> Tensor:
        start, stop = self.class_range
        is_mine = (labels >= start) & (labels < stop)
        local = torch.where(is_mine, labels - start, -1)
        weights, local = self._sample(local, step=step, record=is_training)
        if not is_training:
            weights = weights.detach()  # the adversary wants the gradient of the images alone
        mine = is_mine.nonzero().squeeze(1)
        cosines = (unit[mine] * unit_rows(weights[local[mine]])).sum(1).clamp(-1, 1)
        target = self.config.logit_scale * self._margin(cosines, norms[mine])
        negatives = negatives_logsumexp(
            unit, weights, local, logit_scale=self.config.logit_scale, chunk_classes=self.config.chunk_classes
        )
        targets = torch.zeros_like(negatives).index_copy(0, mine, target)
        terms = gather_terms(torch.stack([negatives, targets]))
        target_logits = terms[:, 1].sum(0)
        normaliser = torch.cat([terms[:, 0], target_logits[None]]).logsumexp(0)
        return normaliser - target_logits

    def _margin(self, cosines: Tensor, norms: Tensor) -> Tensor:
        config = self.config
        match config.kind:
            case "arcface":
                return arc_margin(cosines, config.margin, gradient=config.margin_gradient)
            case "adaface":
                scaler = ada_scaler(norms, self.norm_mean, self.norm_std, config.h)
                return ada_margin(cosines, config.margin, scaler, gradient=config.margin_gradient)

    def _update_statistics(self, norms: Tensor) -> None:
        if not isinstance(self.config, AdaFaceConfig):
            return
        clipped = norms.clamp(1e-3, 100.0)
        momentum = self.config.statistics_momentum
        self.norm_mean.lerp_(clipped.mean(), momentum)
        if len(clipped) > 1:  # one image has no spread
            self.norm_std.lerp_(clipped.std(), momentum)

    def _sample(self, local: Tensor, *, step: int, record: bool) -> tuple[Tensor, Tensor]:
        """Centres that take part, and the targets as indices into them."""
        if self.config.sample_rate >= 1:
            return self.weight, local
        count = len(self.weight)
        positives = torch.unique(local[local >= 0])
        wanted = max(len(positives), round(self.config.sample_rate * count))
        generator = derive_generator(self.seed, "negatives", step=step, rank=self.rank)
        priority = torch.rand(count, generator=generator).to(local.device)
        priority[positives] = 2.0
        chosen = priority.topk(wanted).indices.sort().values
        if record:
            self.sampled = chosen if self.sampled is None else torch.unique(torch.cat([self.sampled, chosen]))
        place = torch.full((count + 1,), -1, dtype=torch.int64, device=local.device)
        place[chosen] = torch.arange(wanted, device=local.device)
        return self.weight[chosen], place[local]


def _initial_weights(start: int, stop: int, dim: int, seed: int) -> Tensor:
    """Rows [start, stop) of a matrix that is drawn block by block, so that any range of it can be made alone."""
    blocks = []
    for block in range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK)):
        generator = derive_generator(seed, "class centres", step=block)
        rows = torch.randn(_INIT_BLOCK, dim, generator=generator) * _INIT_STD
        first = block * _INIT_BLOCK
        blocks.append(rows[max(start, first) - first : min(stop, first + _INIT_BLOCK) - first])
    return torch.cat(blocks)
