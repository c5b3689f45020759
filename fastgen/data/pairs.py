"""Teacher pairs: noise and the sample that the teacher's own deterministic sampler makes of it.

What regression on a teacher's output learns from (DMD, Yin et al. 2024a, equation 9; rectified flow, Liu et al. 2023). Pair i
starts from noise that the run's seed and i decide, so pairs are the same in whatever order and by whomever they are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from fastgen.config import DataConfig
from fastgen.data.cache import Cache, Rows, digest, pick
from fastgen.data.encoding import made_with
from fastgen.denoiser import Condition
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import FewStep, even_times

__all__ = ["make_pairs", "pair_noise", "teacher_sampler"]

AT_ONCE = 16


def teacher_sampler(pipeline: Pipeline, data: DataConfig) -> FewStep:
    """`data.pair_steps` even steps of the teacher's ODE, guided; times are shifted as the pipeline's scheduler shifts them."""
    config = pipeline.diffusers.scheduler.config
    shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift") or 1.0)
    guidance = pipeline.default_guidance if data.pair_guidance is None else data.pair_guidance
    return FewStep(even_times(data.pair_steps, pipeline.process, shift), guidance=guidance)


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
) -> Condition | Rows:
    """`noise` and `target` [N, ...] for each of `prompts`, whose conditions are `condition`, kept on the CPU or in `cache`.

    Raises UserError where the cache cannot be written.
    """
    sampler, teacher = teacher_sampler(pipeline, data), pipeline.frozen()

    def make(index: list[int]) -> Condition:
        noise = torch.stack([pair_noise(pipeline.latent_shape, seed, i) for i in index])
        made = []
        for start in range(0, len(index), AT_ONCE):
            some = torch.tensor(index[start : start + AT_ONCE])
            wanted = condition.take(some) if isinstance(condition, Rows) else pick(condition, some)
            part = noise[start : start + AT_ONCE].to(pipeline.device)
            made.append(sampler.sample(teacher, part, wanted.to(pipeline.device)).float().cpu())
        return Condition({"noise": noise, "target": torch.cat(made)})

    numbers = list(range(len(prompts)))
    if cache is None:
        return make(numbers)
    parts = [name for name, part in pipeline.diffusers.components.items() if part is not None and "vae" not in name]
    described = {**made_with(pipeline, parts), "sampler": asdict(sampler)}
    keys = [digest([prompts[i], seed, i]) for i in numbers]
    return Cache(cache, "pairs", described).fill(keys, make, rank=rank, processes=processes, say=say)
