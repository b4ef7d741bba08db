"""What ranks tell each other in one step of the head: collectives and bytes, counted over gloo processes.

Legend: W ranks, B images of a rank, N = W B, D embedding dimension.
"""

import multiprocessing
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["expected_bytes", "traffic"]

_CLASSES, _DIM = 1000, 512


def expected_bytes(kind: str, *, ranks: int, images: int) -> int:
    """Size of the results of one step on a rank, W B rows each.

    Embeddings with labels, two float64 sums, gradients; for CurricularFace the target cosines too.
    """
    columns = 4 * (_DIM + 1) + 2 * 8 + 4 * (_DIM + 1) + (4 if kind == "curricularface" else 0)
    return ranks * images * columns


def traffic(kind: str, *, ranks: int, images: int) -> tuple[int, int]:
    """(collectives, bytes of their results) on one rank in one forward and backward pass of a head."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        jobs = [
            pool.apply_async(_count, (kind, rank, ranks, images, str(Path(folder) / "store"))) for rank in range(ranks)
        ]
        counts = [job.get(timeout=300) for job in jobs]
    assert len(set(counts)) == 1, counts  # noqa: S101 - all ranks take part in every collective
    return counts[0]


def _count(kind: str, rank: int, ranks: int, images: int, store: str) -> tuple[int, int]:
    import torch
    from pydantic import TypeAdapter
    from torch import distributed
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

    torch.set_num_threads(1)
    files = distributed.FileStore(store, ranks)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=files, rank=rank, world_size=ranks)
    settings = {"kind": kind, **({"margin": 0.5} if kind in ("arcface", "cosface", "adaface") else {})}
    config: HeadConfig = TypeAdapter(HeadConfig).validate_python(settings)
    head = build_head(config, num_classes=_CLASSES, embedding_dim=_DIM, seed=0, rank=rank, world_size=ranks)
    embeddings = torch.randn(images, _DIM, requires_grad=True)
    labels = torch.randint(0, _CLASSES, (images,))
    with Traffic() as seen:  # type: ignore[no-untyped-call]
        torch.autograd.backward([head(embeddings, labels, step=0)])
    distributed.barrier()
    distributed.destroy_process_group()
    return seen.calls, seen.size
