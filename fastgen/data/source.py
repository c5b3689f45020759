"""Training batches: a finite set, encoded once and held in memory, drawn in an order that seed and position decide.

Epoch e of a set is shuffled by a generator seeded with (seed, e), so a position - how many samples all processes have drawn
together - says everything about what comes next: a resumed run goes on with the very sample it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.config import TOY, DataConfig
from fastgen.data.images import find_images, load_images
from fastgen.data.prompts import read_prompts
from fastgen.data.toy.captions import caption
from fastgen.data.toy.scenes import render, sample_scenes
from fastgen.denoiser import Condition, map_tensors
from fastgen.errors import UserError
from fastgen.method import Batch, Need
from fastgen.pipelines.base import Pipeline

__all__ = ["Source", "encode_prompts", "load_source", "toy_pool"]

CHUNK = 64


class Source:
    """A set of conditions, with latents of real images where there are any, as an endless stream of batches."""

    def __init__(
        self,
        condition: Condition,
        latent_shape: Sequence[int],
        latents: Tensor | None = None,
        *,
        prompts: Sequence[str] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        processes: int = 1,
    ):
        """`latent_shape` is one sample's. `latents` [N, ...] belong to `condition`, in order, as `prompts` do.

        Each of `processes` draws its own part, `rank`, of every joint batch.
        """
        if not len(condition) or (latents is not None and len(latents) != len(condition)):
            raise ValueError(f"{len(condition)} conditions and {0 if latents is None else len(latents)} latents are not a set")
        self.condition, self.latents, self.prompts = lean(condition), latents, list(prompts)
        self.latent_shape, self.seed, self.device = tuple(latent_shape), seed, torch.device(device)
        self.rank, self.processes, self.position = rank, processes, 0
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.condition)

    def batch(self, size: int) -> Batch:
        """The next `size` samples of this process, on its device."""
        index = self.indices(self.position + self.rank * size, size)
        self.position += size * self.processes
        latents = None if self.latents is None else self.latents[index].to(self.device)
        return Batch(self.take(index), (size, *self.latent_shape), latents)

    def take(self, index: Tensor) -> Condition:
        """The conditions at `index`, on this process's device."""
        found = Condition(self.condition.inputs, self.condition.shared)[index]
        null = self.condition.null
        if null is not None:
            found.null = null[index if len(null) == len(self) else torch.zeros_like(index)]
        return found.to(self.device)

    def indices(self, start: int, number: int) -> Tensor:
        """Which samples stand at positions `start` to `start + number` of the endless stream."""
        parts = []
        while number:
            epoch, place = divmod(start, len(self))
            part = self.shuffled(epoch)[place : place + number]
            parts.append(part)
            start, number = start + len(part), number - len(part)
        return torch.cat(parts)

    def shuffled(self, epoch: int) -> Tensor:
        if epoch != self.epoch:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.order

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and the size of the set it is a position in."""
        return {"position": self.position, "size": len(self)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. Raises UserError where the set is not the one that was left."""
        if state["size"] != len(self):
            raise UserError(f"the data has {len(self)} samples, but the run that is resumed had {state['size']}")
        self.position = int(state["position"])


def lean(condition: Condition) -> Condition:
    """The same with a null twin of one sample, where all its samples are alike."""
    null = condition.null
    if null is None or len(null) < 2:
        return condition
    alike: list[bool] = []
    map_tensors(lambda x: alike.append(bool((x == x[:1]).all())), null.inputs)
    return Condition(condition.inputs, condition.shared, null[[0]]) if all(alike) else condition


def in_chunks(number: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([*range(0, number, CHUNK), number])]


@torch.no_grad()
def encode_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> Condition:
    """The conditions of `prompts`, encoded a batch at a time and kept on the CPU."""
    return Condition.cat([pipeline.encode_prompts(list(prompts[part])).to("cpu") for part in in_chunks(len(prompts))])


@torch.no_grad()
def encode_images(pipeline: Pipeline, number: int, images: Callable[[slice], Tensor]) -> Tensor:
    return torch.cat([pipeline.encode(images(part)).cpu() for part in in_chunks(number)])


@torch.no_grad()
def image_size(pipeline: Pipeline, device: torch.device | str) -> tuple[int, int]:
    """Height and width in pixels of what the pipeline decodes."""
    height, width = pipeline.decode(torch.zeros(1, *pipeline.latent_shape, device=device)).shape[-2:]
    return height, width


def toy_pool(number: int, seed: int, *, split: str = "train") -> tuple[Tensor, list[str]]:
    """`number` scenes of the toy world: images [N, 3, 32, 32] in [-1, 1] and their captions."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(number, generator, split=split)
    return render(scenes, generator), caption(scenes, generator)


def load_source(
    pipeline: Pipeline,
    data: DataConfig,
    needs: Collection[Need],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    processes: int = 1,
) -> Source:
    """What a method needs of the data that a run describes, encoded.

    A method that needs images gets the captions of those images as prompts. "toy" is a pool of `data.pool` scenes of the
    training split. Raises UserError where the data does not have what is needed.
    """
    if "pairs" in needs:
        raise UserError("this method learns from teacher pairs (noise and sample), which data.prompts and data.images are not")
    latents = None
    if "images" not in needs:
        prompts = toy_pool(data.pool, seed)[1] if data.prompts == TOY else read_prompts(data.prompts)
    elif not data.images:
        raise UserError("data.images is missing; this method needs a folder of pictures with a .txt caption beside each")
    elif data.images == TOY:
        pictures, prompts = toy_pool(data.pool, seed)
        latents = encode_images(pipeline, data.pool, lambda part: pictures[part].to(device))
    else:
        paths, prompts = find_images(data.images)
        size = image_size(pipeline, device)
        latents = encode_images(pipeline, len(paths), lambda part: load_images(paths[part], size).to(device))
    condition = encode_prompts(pipeline, prompts)
    return Source(
        condition, pipeline.latent_shape, latents, prompts=prompts, seed=seed, device=device, rank=rank, processes=processes
    )
