"""What ranks tell each other in one step of the head: collectives and bytes, counted over gloo processes.

Legend: W ranks, B images of a rank, N = W B, D embedding dimension.
"""

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["expected_bytes", "traffic"]

_CLASSES, _DIM = 1000, 512


def expected_bytes(kind: str, *, ranks: int, images: int) -> int:
    """Size of the results of one step on a rank, W B rows each.

    Embeddings with labels, two float64 sums, gradients; for CurricularFace the target cosines, for MagFace a third sum.
    """
    extra = {"curricularface": 4, "magface": 8}.get(kind, 0)
    return ranks * images * (4 * (_DIM + 1) + 2 * 8 + 4 * (_DIM + 1) + extra)


def traffic(kinds: Sequence[str], *, ranks: int, images: int) -> dict[str, tuple[int, int]]:
    """(collectives, bytes of their results) on one rank in one forward and backward pass of each kind of head."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        jobs = [
            pool.apply_async(_rank, (kinds, rank, ranks, images, str(Path(folder) / "store"))) for rank in range(ranks)
        ]
        counts = [job.get(timeout=300) for job in jobs]
    return dict(zip(kinds, counts[0], strict=True))


def _rank(kinds: Sequence[str], rank: int, ranks: int, images: int, store: str) -> list[tuple[int, int]]:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    files = distributed.FileStore(store, ranks)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=files, rank=rank, world_size=ranks)
    counts = [_count(kind, rank, ranks, images) for kind in kinds]
    distributed.barrier()
    distributed.destroy_process_group()
    return counts


def _count(kind: str, rank: int, ranks: int, images: int) -> tuple[int, int]:
    import torch
    from pydantic import TypeAdapter
    from torch.utils._python_dispatch import TorchDispatchMode

    from aroface.config.head import HeadConfig
    from aroface.heads import build_head

    class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Sees every operation, those of the backward pass too."""

        calls = size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            if func.namespace == "c10d":
                self.calls += 1
                result = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
                self.size += result.numel() * result.element_size()
            return func(*args, **(kwargs or {}))

    settings = {"kind": kind, **({"margin": 0.5} if kind in ("arcface", "cosface", "adaface") else {})}
    config: HeadConfig = TypeAdapter(HeadConfig).validate_python(settings)
    head = build_head(config, num_classes=_CLASSES, embedding_dim=_DIM, seed=0, rank=rank, world_size=ranks)
    embeddings = torch.randn(images, _DIM, requires_grad=True)
    labels = torch.randint(0, _CLASSES, (images,))
    with Traffic() as seen:  # type: ignore[no-untyped-call]
        torch.autograd.backward([head(embeddings, labels, step=0)])
    return seen.calls, seen.size
