"""Batches on their way to the device while the step before them runs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from aroface.types import Batch

__all__ = ["on_device"]


class _Copy(NamedTuple):
    batch: Batch
    source: Batch  #: pinned; must live until the copy is done
    done: torch.cuda.Event


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch one step ahead, on a stream of its own; where the device is the CPU, hand it on as it is.

    Args:
        batches: in pinned memory where the device is a GPU.
        device: where the step runs.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: _Copy | None = None
    for batch in batches:
        copied = _start_copy(batch, stream, device)
        if ahead is not None:
            yield _finished(ahead, device)
        ahead = copied
    if ahead is not None:
        yield _finished(ahead, device)


def _start_copy(batch: Batch, stream: torch.cuda.Stream, device: torch.device) -> _Copy:
    with torch.cuda.stream(stream):
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        done = stream.record_event()
    return _Copy(Batch(images, labels, batch.samples), batch, done)


def _finished(copy: _Copy, device: torch.device) -> Batch:
    """Let the step's stream wait for the copy, and keep its memory until the step has used it."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copy.done)
    copy.batch.images.record_stream(current)
    copy.batch.labels.record_stream(current)
    return copy.batch
