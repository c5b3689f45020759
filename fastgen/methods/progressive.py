"""Progressive distillation: every stage teaches the student to do in one step what its teacher does in several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastgen.denoiser import Denoiser, Guided
from fastgen.errors import UserError
from fastgen.families.progressive import ProgressiveDistillation, divided
from fastgen.losses import drawn_scales, snr
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline


@dataclass
class Progressive(ProgressiveDistillation):
    """Progressive distillation (Salimans and Ho 2022), guidance taken in at the first stage (Meng et al. 2023).

    The first teacher is the pipeline at `start_steps` DDIM steps, each later one the student of the stage before, frozen.
    The student of a stage learns, from diffused data, the clean sample with which one of its steps lands where `factor`
    steps of the teacher land (appendix G), weighted with max(SNR, 1) (section 4). `train.schedule = "linear"` lets the
    learning rate fall to zero in every stage, as there.

    With `guidance_low` and `guidance_high` this is stage two of Meng et al.: a guidance scale is drawn for each sample and
    is an input of student and teacher (a full network; `guidance` is then what is told in sampling). It goes on from what
    guidance_distillation exports; from any other pipeline the first stage does both at once.

    Differences from the papers: stages may skip (`factor` above 2); at t = 1 the input is noise alone, as in sampling,
    whatever signal the process leaves there; scales are in the convention where 1 is off (w + 1); no stochastic sampler.
    """

    stop_steps: int = field(default=4, metadata={"help": "steps of the last student: start_steps over a power of factor"})
    factor: int = field(default=2, metadata={"help": "teacher steps that one step of the student replaces"})
    guidance_low: float | None = field(
        default=None, metadata={"help": "least of the guidance scales that are an input; none: one fixed scale", "at_least": 1}
    )
    guidance_high: float | None = field(
        default=None, metadata={"help": "greatest of the guidance scales that are an input", "at_least": 1}
    )
    weight: Literal["truncated_snr", "snr_plus_one"] = field(
        default="truncated_snr", metadata={"help": "weight of the error in x0: max(SNR, 1), or SNR + 1 (plain error in v)"}
    )

    def __post_init__(self) -> None:
        self.check_stages()
        low, high, scale = self.guidance_low, self.guidance_high, self.guidance
        if (low is None) != (high is None):
            raise UserError(f"guidance_low = {low} and guidance_high = {high} are given together or not at all")
        if low is None or high is None:
            return
        if low > high:
            raise UserError(f"guidance_low = {low:g} must be at most guidance_high = {high:g}")
        if scale is not None and not low <= scale <= high:
            trained = f"guidance_low = {low:g} to guidance_high = {high:g}"
            raise UserError(f"guidance = {scale:g} is outside what the student is trained for, {trained}")

    @property
    def stages(self) -> list[int]:
        return divided(self.start_steps, self.stop_steps, self.factor)

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        if self.guidance_low is not None and self.guidance_high is not None:
            self.told = min(max(self.scale, self.guidance_low), self.guidance_high)

    def network(self, pipeline: Pipeline, role: str) -> Denoiser:
        return pipeline.trainable(role, guidance_embedding=self.guidance_low is not None)

    def scales(self, count: int, device: torch.device) -> Tensor | None:
        """A guidance scale for each sample, [B], where they are an input."""
        if self.guidance_low is None or self.guidance_high is None:
            return None
        return drawn_scales(self.guidance_low, self.guidance_high, count, device)

    def loss(self, batch: Batch) -> Loss:
        xt, times = self.begin(batch)
        scale = self.scales(len(xt), xt.device)
        prediction = Guided(self.student, self.told)(xt, times[0], batch.condition, guidance=scale)
        return {"x0": self.regression(prediction, times, batch.condition, scale)}

    def weight_at(self, t: Tensor, like: Tensor) -> Tensor:
        return super().weight_at(t, like) if self.weight == "truncated_snr" else snr(self.student.process, t, like) + 1
