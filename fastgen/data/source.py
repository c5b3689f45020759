"""Training batches: a finite set, encoded once, drawn in an order that seed and position decide.

Epoch e of a set is shuffled by a generator seeded with (seed, e), so a position - how many samples all processes have drawn
together - says everything about what comes next: a resumed run goes on with the very sample it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.config import TOY, DataConfig
from fastgen.data.buckets import bucket_sizes, group_by_size
from fastgen.data.cache import Rows, lean, pick
from fastgen.data.encoding import CHUNK, cache_prompts, encode_pictures, encode_prompts
from fastgen.data.images import find_pictures, find_prompts
from fastgen.data.pairs import make_pairs
from fastgen.data.pictures import BadSamples, Picture
from fastgen.data.readers import Readers
from fastgen.data.toy.captions import caption
from fastgen.data.toy.scenes import render, sample_scenes
from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.method import Batch, Need
from fastgen.pipelines.base import Pipeline

__all__ = ["Buckets", "Source", "check_files", "encode_prompts", "load_source", "toy_pool"]


class Source:
    """A set of conditions, with latents of images or teacher pairs where there are any, as an endless stream of batches."""

    def __init__(
        self,
        condition: Condition | Rows,
        latent_shape: Sequence[int],
        latents: Tensor | Rows | None = None,
        *,
        pairs: Condition | Rows | None = None,
        prompts: Sequence[str] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        processes: int = 1,
    ):
        """`latent_shape` is one sample's. `latents` [N, ...] and `pairs` (`noise` and `target` [N, ...]) belong to `condition`,
        in order, as `prompts` do; each is in memory, or rows of a cache.

        Each of `processes` draws its own part, `rank`, of every joint batch.
        """
        for others in (latents, pairs):
            if not len(condition) or (others is not None and len(others) != len(condition)):
                raise ValueError(f"{len(condition)} conditions and {0 if others is None else len(others)} samples are no set")
        self.condition = lean(condition) if isinstance(condition, Condition) else condition
        self.latents, self.pairs, self.prompts = latents, pairs, list(prompts)
        self.latent_shape, self.seed, self.device = tuple(latent_shape), seed, torch.device(device)
        self.rank, self.processes, self.position = rank, processes, 0
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.condition)

    def batch(self, size: int) -> Batch:
        """The next `size` samples of this process, on its device."""
        index = self.indices(self.position + self.rank * size, size)
        self.position += size * self.processes
        return self.at(index)

    def at(self, index: Tensor) -> Batch:
        """The samples at `index` [B], on this process's device."""
        latents = self.latents
        if isinstance(latents, Rows):
            latents = latents.take(index).inputs["latents"]
        elif latents is not None:
            latents = latents[index]
        batch = Batch(self.take(index), (len(index), *self.latent_shape), None if latents is None else latents.to(self.device))
        if self.pairs is not None:
            pairs = self.rows(self.pairs, index).to(self.device).inputs
            batch.noise, batch.target = pairs["noise"], pairs["target"]
        if self.prompts:
            batch.prompts = tuple(self.prompts[i] for i in index.tolist())
        return batch

    def take(self, index: Tensor) -> Condition:
        """The conditions at `index`, on this process's device."""
        return self.rows(self.condition, index).to(self.device)

    @staticmethod
    def rows(samples: Condition | Rows, index: Tensor) -> Condition:
        return samples.take(index) if isinstance(samples, Rows) else pick(samples, index)

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
            generator = torch.Generator().manual_seed(seeded(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator)
        return self.order

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and the size of the set it is a position in."""
        return {"position": self.position, "size": len(self)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. Raises UserError where the set is not the one that was left."""
        if state["size"] != len(self):
            raise UserError(f"the data has {len(self)} samples, but the run that is resumed had {state['size']}")
        self.position = int(state["position"])


class Buckets(Source):
    """Several sources, each of one resolution, as one endless stream; every joint batch is of one of them.

    In every epoch each is shuffled and cut into batches, the last filled up from its own beginning; then the batches are
    shuffled. Seed and position decide all of it. Where a run goes on with another joint batch, as it does on another number of
    processes, what is left of the epoch is cut anew: every sample is still seen once.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int = 0, rank: int = 0, processes: int = 1):
        self.sources, self.seed, self.rank, self.processes = list(sources), seed, rank, processes
        self.prompts = [prompt for source in self.sources for prompt in source.prompts]
        self.latent_shape, self.device = self.sources[0].latent_shape, self.sources[0].device
        self.turn = 0  # The epoch.
        self.drawn: list[tuple[int, int]] = []  # In this epoch: size of a joint batch, and how many of it.
        self.planned: tuple[Any, ...] = ()
        self.plan: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def batch(self, size: int) -> Batch:
        """The next `size` samples of this process, all of one resolution, on its device."""
        joint = size * self.processes
        if not self.drawn or self.drawn[-1][0] != joint:
            self.drawn.append((joint, 0))
        place = self.drawn[-1][1]
        if place == len(self.planned_batches()):
            self.turn, self.drawn, place = self.turn + 1, [(joint, 0)], 0
        bucket, index = self.planned_batches()[place]
        self.drawn[-1] = (joint, place + 1)
        return self.sources[bucket].at(index[self.rank * size : (self.rank + 1) * size])

    def planned_batches(self) -> list[tuple[int, Tensor]]:
        """The joint batches of this epoch since their size last changed: from which source, and which of its samples."""
        key = (self.turn, *self.drawn[:-1], self.drawn[-1][0])
        if self.planned != key:
            self.planned, self.plan = key, self.batches(self.turn, self.drawn)
        return self.plan

    def batches(self, epoch: int, drawn: Sequence[tuple[int, int]]) -> list[tuple[int, Tensor]]:
        """An epoch's joint batches in order, the last size's of `drawn`, after so many of each size before it."""
        generator = torch.Generator().manual_seed(seeded(self.seed, epoch))
        left = [torch.randperm(len(source), generator=generator) for source in self.sources]
        found: list[tuple[int, int, Tensor]] = []
        for i, (joint, _) in enumerate(drawn):
            if i:  # What the batches of the size before have left, without what filled them up.
                rest = sorted((number, start) for number, start, _ in found[drawn[i - 1][1] :])
                parts = [
                    [left[n][start : start + drawn[i - 1][0]] for n, start in rest if n == number]
                    for number in range(len(left))
                ]
                left = [torch.cat(part) if part else torch.empty(0, dtype=torch.long) for part in parts]
            found = []
            for number, order in enumerate(left):
                whole = order.repeat(-(-joint // max(1, len(order))) + 1)
                found += [(number, start, whole[start : start + joint]) for start in range(0, len(order), joint)]
            found = [found[k] for k in torch.randperm(len(found), generator=generator).tolist()]
        return [(number, index) for number, _, index in found]

    def take(self, index: Tensor) -> Condition:
        raise TypeError("samples of different resolutions are no batch")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the epoch, what was drawn in it, and the sizes of the buckets."""
        return {
            "epoch": self.turn,
            "drawn": [list(each) for each in self.drawn],
            "buckets": [len(each) for each in self.sources],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. Raises UserError where the pictures are not those that were left."""
        buckets = [len(source) for source in self.sources]
        if state.get("buckets") != buckets:
            raise UserError(
                f"the data has buckets of {buckets} pictures, but the run that is resumed had {state.get('buckets', 'none')}"
            )
        if "drawn" not in state:
            raise UserError(
                "the checkpoint was written by an older fastgen, which cannot tell its place in the buckets; start anew"
            )
        self.turn = int(state["epoch"])
        self.drawn = [(int(joint), int(number)) for joint, number in state["drawn"]]


def seeded(seed: int, epoch: int) -> int:
    """The seed of an epoch's order."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


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


def check_files(data: DataConfig, needs: Collection[Need], why_images: str = "") -> None:
    """Raise UserError for prompts or pictures that a run needs and that are not there, before a model is loaded.

    `why_images` is the method's own reason, where it has one (`Method.why_images`).
    """
    bad = BadSamples(data.bad_samples)
    if "images" in needs:
        if not data.images:
            wanted = "a folder of pictures with a .txt caption beside each, .tar shards, or a dataset"
            why = f" (method.{why_images})" if why_images else ""
            raise UserError(f"data.images is missing; this method needs {wanted}{why}")
        if data.images != TOY:
            find_pictures(data, bad)
    elif data.prompts != TOY:
        find_prompts(data, bad)


def load_source(
    pipeline: Pipeline,
    data: DataConfig,
    needs: Collection[Need],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
) -> Source:
    """What a method needs of the data that a run describes, encoded.

    A method that needs images gets the captions of those images as prompts. "toy" is a pool of `data.pool` scenes of the
    training split; it is kept in memory, other data in the folder `data.cache`. `say` is told how long work goes on. Raises
    UserError where the data does not have what is needed.
    """
    check_files(data, needs)
    pictured = "images" in needs
    toy = (data.images if pictured else data.prompts) == TOY
    cache, bad = None if toy else data.cache, BadSamples(data.bad_samples, say)
    share: dict[str, Any] = {"rank": rank, "processes": processes, "say": say}
    latents: Tensor | Rows | None = None
    if not pictured:
        prompts = toy_pool(data.pool, seed)[1] if toy else find_prompts(data, bad)
    elif toy:
        images, prompts = toy_pool(data.pool, seed)
        latents = in_memory(pipeline, images, device)
    else:
        pictures, prompts = find_pictures(data, bad)
        size = image_size(pipeline, device)
        with Readers(data.workers) as readers:
            reading: dict[str, Any] = {"readers": readers, "bad": bad, **share}
            if data.buckets:
                groups = group_by_size(pictures, bucket_sizes(*size), bad)
                found = load_buckets(pipeline, pictures, prompts, groups, data, reading, share, seed, device, "pairs" in needs)
                bad.tell(len(found), data.images)
                return found
            latents, kept = encode_pictures(pipeline, pictures, size, cache, **reading)
        bad.tell(len(kept), data.images)
        prompts = [prompts[i] for i in kept]
    if "pairs" in needs and not pictured:
        prompts = [prompts[i % len(prompts)] for i in range(data.pairs)]
    condition = encode_prompts(pipeline, prompts) if cache is None else cache_prompts(pipeline, prompts, cache, **share)
    pairs = make_pairs(pipeline, condition, prompts, data, seed=seed, cache=cache, **share) if "pairs" in needs else None
    return Source(
        *(condition, pipeline.latent_shape, latents),
        pairs=pairs,
        prompts=prompts,
        seed=seed,
        device=device,
        rank=rank,
        processes=processes,
    )


def load_buckets(
    pipeline: Pipeline,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    groups: Mapping[tuple[int, int], list[int]],
    data: DataConfig,
    reading: Mapping[str, Any],
    share: Mapping[str, Any],
    seed: int,
    device: torch.device | str,
    paired: bool,
) -> Buckets:
    """Pictures and their captions, each encoded at the size (height, width) of the one of `groups` that it is in.

    If `paired` each caption also gets a teacher pair of that size.
    """
    sources, cache = [], data.cache
    for size, group in groups.items():
        latents, kept = encode_pictures(pipeline, [pictures[i] for i in group], size, cache, **reading)
        if not kept:
            continue
        index = [group[i] for i in kept]
        some = [prompts[i] for i in index]
        if cache is None:
            condition: Condition | Rows = encode_prompts(pipeline, some, size=size)
        else:
            condition = cache_prompts(pipeline, some, cache, size=size, **share)
        first = latents.take(torch.tensor([0])).inputs["latents"] if isinstance(latents, Rows) else latents
        shape, pairs = tuple(first.shape[1:]), None
        if paired:
            bucket = (size, shape, index)
            pairs = make_pairs(pipeline, condition, some, data, seed=seed, cache=cache, bucket=bucket, **share)
        sources.append(Source(condition, shape, latents, pairs=pairs, prompts=some, device=device))
    if not sources:
        reading["bad"].tell(0, data.images)
    return Buckets(sources, seed=seed, rank=share["rank"], processes=share["processes"])


@torch.no_grad()
def in_memory(pipeline: Pipeline, images: Tensor, device: torch.device | str) -> Tensor:
    """The latents of images, on the CPU."""
    return torch.cat([pipeline.encode(some.to(device)).cpu() for some in images.split(CHUNK)])
