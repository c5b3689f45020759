"""The next batch made ready while this one is computed on: read from the disk, joined, and for a GPU put into pinned memory.

What comes is what would come without it, in the same order. A checkpoint has the place of what was handed out, not of what is
ready.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastgen.data.cache import Rows
from fastgen.data.source import Buckets, Source
from fastgen.denoiser import Condition, map_tensors
from fastgen.method import Batch

__all__ = ["Ahead", "ahead"]


def ahead(source: Source) -> Source:
    """The same source a batch ahead, where that saves waiting: its samples are on a disk, or go to a GPU."""
    parts = source.sources if isinstance(source, Buckets) else [source]
    read = any(isinstance(each, Rows) for part in parts for each in (part.condition, part.latents, part.pairs))
    return Ahead(source) if read or source.device.type == "cuda" else source


class Ahead(Source):
    """A source whose next batch, of the size of the last, is made by a thread of its own."""

    def __init__(self, source: Source):
        """`source` is this one's alone from now on: it stays on the CPU, and batches are moved to its device here."""
        self.source, self.device = source, source.device
        self.prompts, self.latent_shape = source.prompts, source.latent_shape
        for part in (source, *(source.sources if isinstance(source, Buckets) else ())):
            part.device = torch.device("cpu")
        self.worker: ThreadPoolExecutor | None = None
        self.next: tuple[int, Future[Batch]] | None = None
        self.place: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, size: int) -> Batch:
        """The next `size` samples of this process, on its device."""
        if self.next is not None and self.next[0] != size:
            self.forget()
        batch = self.source.batch(size) if self.next is None else self.next[1].result()
        self.place = self.source.state()
        self.worker = self.worker or ThreadPoolExecutor(1, "fastgen-data")
        self.next = size, self.worker.submit(self._ready, size)
        return moved(batch, self.device)

    def _ready(self, size: int) -> Batch:
        batch = self.source.batch(size)
        return pinned(batch) if self.device.type == "cuda" else batch

    def forget(self) -> None:
        """Go back to before what is ready, if anything is."""
        if self.next is not None:
            self.next[1].exception()  # wait for it, whatever became of it
            self.next = None
            self.source.load_state(self.place)

    def at(self, index: Tensor) -> Batch:
        return moved(self.source.at(index), self.device)

    def take(self, index: Tensor) -> Condition:
        return self.source.take(index).to(self.device)

    def state(self) -> dict[str, Any]:
        return self.source.state() if self.next is None else self.place

    def load_state(self, state: dict[str, Any]) -> None:
        self.forget()
        self.source.load_state(state)


def pinned(batch: Batch) -> Batch:
    """The batch in memory from which a GPU copies by itself."""
    return _each(batch, lambda x: x.pin_memory())


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; from pinned memory without waiting for it."""
    return batch if device.type == "cpu" else _each(batch, lambda x: x.to(device, non_blocking=True))


def _each(batch: Batch, function: Any) -> Batch:
    def of(condition: Condition) -> Condition:
        null = None if condition.null is None else of(condition.null)
        return Condition(map_tensors(function, condition.inputs), map_tensors(function, condition.shared), null)

    latents, noise, target = (None if x is None else function(x) for x in (batch.latents, batch.noise, batch.target))
    return Batch(of(batch.condition), batch.shape, latents, noise, target, batch.prompts)
