"""Run a function on several gloo ranks of this machine."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 100) -> list[Any]:
    """Call `function(rank, ranks, *args)` in one process per rank; returns the results in rank order.

    The function must be defined at the top of a module; arguments and results must pickle. An exception on any rank is
    raised here with its traceback, and so is a rank that does not answer in time.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_worker, args=(function, rank, ranks, store, queue, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        try:
            while len(results) < ranks:
                rank, value, error = queue.get(timeout=timeout_s)
                if error:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                results[rank] = pickle.loads(value)  # noqa: S301 - written by the process just started
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    return [results[rank] for rank in range(ranks)]


def _worker(function: Callable[..., Any], rank: int, ranks: int, store: str, queue: Any, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(store, ranks),
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=60),
        )
        # by value: the handles that a queue passes for tensors die with this process
        queue.put((rank, pickle.dumps(function(rank, ranks, *args)), None))
        distributed.barrier()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
