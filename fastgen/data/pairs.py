"""Teacher pairs: noise and the sample that the teacher's own deterministic sampler makes of it.

What regression on a teacher's output learns from (DMD, Yin et al. 2024a, equation 9; rectified flow, Liu et al. 2023). Pair i
starts from noise that the run's seed and i decide, so pairs are the same in whatever order and by whomever they are made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastgen.config import DataConfig
from fastgen.data.cache import Cache, Rows, digest, pick
from fastgen.data.encoding import made_with
from fastgen.denoiser import Condition
from fastgen.pipelines.base import Pipeline
from fastgen.pipelines.check import watch
from fastgen.samplers import FewStep, even_times

__all__ = ["make_pairs", "pair_noise", "teacher_sampler"]

AT_ONCE = 16


def teacher_sampler(pipeline: Pipeline, data: DataConfig, size: tuple[int, int] | None = None) -> FewStep:
    """`data.pair_steps` steps of the teacher's ODE, guided; times are shifted as the pipeline shifts them at `size`.

    `size` (height, width) in pixels is the pipeline's own by default.
    """
    config = pipeline.diffusers.scheduler.config
    guidance = pipeline.default_guidance if data.pair_guidance is None else data.pair_guidance
    if config.get("use_dynamic_shifting"):
        return FewStep(own_times(pipeline, data.pair_steps, size), guidance=guidance)
    return FewStep(even_times(data.pair_steps, pipeline.process, float(config.get("shift") or 1.0)), guidance=guidance)


def own_times(pipeline: Pipeline, steps: int, size: tuple[int, int] | None = None) -> tuple[float, ...]:
    """The noise levels that a flow pipeline itself goes through in `steps` steps at `size`, seen in a run up to its first.

    How such a pipeline shifts them depends on the resolution, in some families on the number of steps too.
    """
    whole = pipeline.diffusers
    height, width = size or (pipeline.height, pipeline.width)
    asked: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "latent"}
    asked |= {"generator": torch.Generator().manual_seed(0), "use_resolution_binning": False}
    known, bar = inspect.signature(type(whole).__call__).parameters, getattr(whole, "_progress_bar_config", {})
    whole.set_progress_bar_config(**{**bar, "disable": True})
    try:
        watch(whole, ["a"], steps=1, **{key: value for key, value in asked.items() if key in known and value is not None})
    finally:
        whole.set_progress_bar_config(**bar)
    return tuple(min(1.0, level) for level in whole.scheduler.sigmas[:steps].double().tolist())


def pair_noise(shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """The unit noise of pair `number`, of one latent `shape`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(digest(["pair", seed, number])[:15], 16)))


@torch.no_grad()
def make_pairs(
    pipeline: Pipeline,
    condition: Condition | Rows,
    prompts: list[str],
    data: DataConfig,
    *,
    seed: int,
    cache: str | None = None,
    rank: int = 0,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
    bucket: tuple[tuple[int, int], tuple[int, ...], Sequence[int]] | None = None,
) -> Condition | Rows:
    """`noise` and `target` [N, ...] for each of `prompts`, whose conditions are `condition`, kept on the CPU or in `cache`.

    `bucket`: the pairs' size (height, width) in pixels, the shape of one's latents, and their numbers, where those are not the
    pipeline's own and 0, 1, ... Raises UserError where the cache cannot be written.
    """
    size, shape, numbers = bucket or (None, pipeline.latent_shape, range(len(prompts)))
    sampler, teacher = teacher_sampler(pipeline, data, size), pipeline.frozen()

    def make(index: list[int]) -> Condition:
        noise = torch.stack([pair_noise(shape, seed, numbers[i]) for i in index])
        made = []
        for start in range(0, len(index), AT_ONCE):
            some = torch.tensor(index[start : start + AT_ONCE])
            wanted = condition.take(some) if isinstance(condition, Rows) else pick(condition, some)
            part = noise[start : start + AT_ONCE].to(pipeline.device)
            made.append(sampler.sample(teacher, part, wanted.to(pipeline.device)).float().cpu())
        return Condition({"noise": noise, "target": torch.cat(made)})

    if cache is None:
        return make(list(range(len(prompts))))
    parts = [name for name, part in pipeline.diffusers.components.items() if part is not None and "vae" not in name]
    described = {**made_with(pipeline, parts), "sampler": asdict(sampler), **({"size": size} if size else {})}
    keys = [digest([prompt, seed, number]) for prompt, number in zip(prompts, numbers, strict=True)]
    return Cache(cache, "pairs", described).fill(keys, make, rank=rank, processes=processes, say=say)
