"""What every candidate of a sweep is asked, and what its images are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data.toy.reader import correct
from fastgen.data.toy.scenes import Scenes
from fastgen.errors import UserError
from fastgen.eval.evaluation import REFERENCE_SEED, gather, known_reference, open_reference, real_images, toy_name, toy_prompts
from fastgen.eval.images import Images, batches, from_uint8
from fastgen.eval.pictures import split_reference
from fastgen.eval.protocol import asking
from fastgen.eval.registry import Evidence
from fastgen.eval.statistics import Statistics
from fastgen.eval.world import World


@dataclass
class Task:
    """What every candidate is asked, and what its images are compared with."""

    prompts: list[str]
    seeds: list[int]
    scenes: Scenes | None
    reference: Images | None
    floor: Images | None
    statistics: Statistics | None
    world: World
    device: str
    metrics: Sequence[str] | None
    asked: dict[str, Any]
    former: Evidence | None = field(default=None, repr=False)

    def evidence(self, images: Images, teacher: Images | None) -> Evidence:
        """Evidence on some images; features of real and teacher images are not computed again."""
        made = gather(
            *(images, self.prompts), scenes=self.scenes, reference=self.reference, floor=self.floor, teacher=teacher,
            statistics=self.statistics, world=self.world, device=self.device,
        )  # fmt: skip
        if self.former is not None:
            made.share(self.former, ["reference", "floor"])
        self.former = made
        return made

    def right(self, images: Images) -> Tensor | None:
        """Of each toy image whether everything in it is right, bool [N]."""
        if self.scenes is None:
            return None
        marks, start = [], 0
        for shown in batches(images, 512):
            scenes = self.scenes[torch.arange(start, start + len(shown))]
            marks.append(correct(from_uint8(shown), scenes)["strict"].bool())
            start += len(shown)
        return torch.cat(marks)


def make_task(
    images: int,
    seed: int,
    seeds_per_prompt: int,
    prompts: Sequence[str] | None,
    prompts_from: str,
    reference: Tensor | Path | str | None,
    split: str,
    objects: int | None,
    world: World,
    device: str,
    metrics: Sequence[str] | None,
) -> Task:
    """The task of a sweep with these arguments. Raises UserError for an empty list of prompts and an unreadable reference."""
    scenes = None
    real, statistics = open_reference(reference)
    floor: Images | None = None
    if prompts is None:
        texts, seeds, scenes = toy_prompts(images, seeds_per_prompt=seeds_per_prompt, seed=seed, split=split, objects=objects)
        prompts_from = toy_name(split, objects)
        if real is None and statistics is None:
            real, floor = real_images(scenes, REFERENCE_SEED), real_images(scenes, REFERENCE_SEED + 1)
    elif not prompts:
        raise UserError("the list of prompts is empty")
    else:
        block = seeds_per_prompt * len(prompts)
        texts = [prompts[i // seeds_per_prompt % len(prompts)] for i in range(images)]
        seeds = [seed + i % seeds_per_prompt + seeds_per_prompt * (i // block) for i in range(images)]
    if floor is None and real is not None and len(real) >= 2 * images:
        real, floor = split_reference(real, images)
    asked = asking(texts, seeds, name=prompts_from, reference=known_reference(real, reference))
    return Task(texts, seeds, scenes, real, floor, statistics, world, device, metrics, asked)
