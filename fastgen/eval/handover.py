"""Diversity distillation: the teacher makes the first steps, the student the rest.

Gandikota and Bau 2025 ("Distilling Diversity and Control in Diffusion Models", arXiv:2503.10637): distilled models settle the
layout of an image at their first step, so that images of one prompt become alike; the teacher in their place for that step
gives the diversity back, at the price of its (guided) call.

Both look at the same times, the student's. The teacher follows the ODE from each of its times to the next; the student goes on
as its own sampler does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Predicts
from fastgen.errors import UserError
from fastgen.process import Kind, Prediction, Process
from fastgen.samplers import FewStep, Sampler, SchedulerSpec


@dataclass(frozen=True)
class Handover(Sampler):
    """The student's sampler `own`, whose first `first` calls are the teacher's, guided by `guidance` (diffusers convention).

    With `first` 0 it is `own`; with all steps it is the teacher's ODE sampler at the same times.
    """

    own: FewStep
    teacher: Predicts
    first: int
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.own.steps:
            raise UserError(f"the teacher can make 0 to {self.own.steps} of the {self.own.steps} steps, not {self.first}")
        if self.guidance < 1:
            raise UserError(f"the guidance scale must be at least 1, which means none, not {self.guidance:g}")

    @property
    def steps(self) -> int:
        return self.own.steps

    def sample(
        self,
        denoiser: Predicts,
        noise: Tensor,
        condition: Condition,
        *,
        generator: torch.Generator | None = None,
        exit_at: int | None = None,
        guidance: float | None = None,
        watch: Callable[[Prediction], None] | None = None,
    ) -> Tensor:
        """As `Sampler.sample`; `denoiser` is the student, `guidance` takes the place of its sampler's own."""
        if self.first == 0:
            kept = {"generator": generator, "exit_at": exit_at, "guidance": guidance, "watch": watch}
            return self.own.sample(denoiser, noise, condition, **kept)  # type: ignore[arg-type]
        if exit_at is not None:
            raise UserError("a handover from teacher to student is for sampling alone, not for training")
        teachers = FewStep(self.own.times[: self.first], guidance=self.guidance)
        last: list[Prediction] = []

        def see(prediction: Prediction) -> None:
            last[:] = [prediction]
            if watch is not None:
                watch(prediction)

        clean = teachers.sample(self.teacher, noise, condition, watch=see)
        if self.first == self.own.steps:
            return clean
        rest = replace(self.own, times=self.own.times[self.first :])
        start = noise.new_full((len(noise),), rest.times[0], dtype=torch.promote_types(noise.dtype, torch.float32))
        scale = denoiser.process.initial_scale(start).view(-1, *[1] * (noise.ndim - 1))
        begin = (last[0].at(start) / scale).to(noise.dtype)  # a sampler multiplies what it starts from by this scale
        return rest.sample(denoiser, begin, condition, generator=generator, guidance=guidance, watch=watch)

    def scheduler(self, process: Process, kind: Kind) -> SchedulerSpec:
        raise UserError("no stock diffusers scheduler hands over from one network to another")
