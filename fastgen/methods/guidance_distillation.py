"""Guidance distillation: a student that answers in one call what its teacher answers in two, for every guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fastgen.denoiser import Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.progressive import truncated_snr
from fastgen.losses import drawn_scales, noised, squared, uniform_times
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import FewStep, even_times


@dataclass
class GuidanceDistillation(Method):
    """Guidance distillation (Meng et al. 2023, stage one): half the network calls, at any number of steps.

    At diffused data of every noise level the student learns the guided teacher's clean estimate, with weight max(SNR, 1),
    for a scale that is drawn for each sample and is an input of the student (section 3.1; a full network). What it exports
    is a pipeline whose guidance is embedded; progressive goes on from it to fewer steps (stage two). With
    `embed_guidance = false` one fixed scale is merged into the student instead, which a LoRA can learn too.

    Differences from the paper: scales are in the convention where 1 is off (w + 1: 3 to 15 are the 2 to 14 of its
    text-to-image models); times are uniform on the pipeline's own grid, moved by `noise_shift`; at t = 1 the input is noise
    alone, as in sampling.
    """

    guidance_low: float = field(default=3.0, metadata={"help": "least guidance scale of the teacher, 1 = off", "at_least": 1})
    guidance_high: float = field(default=15.0, metadata={"help": "greatest guidance scale of the teacher", "at_least": 1})
    embed_guidance: bool = field(
        default=True, metadata={"help": "make the scale an input of the student; false: learn one fixed scale"}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "scale told to the student in sampling; none: the pipeline's own, within the range"}
    )
    steps: int = field(default=50, metadata={"help": "network calls a sample; any fewer can be asked for", "at_least": 1})
    shift: float = field(default=1.0, metadata={"help": "moves the steps towards noise, for flow models", "above": 0})
    noise_shift: float = field(default=1.0, metadata={"help": "moves the times of the loss towards noise", "above": 0})

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})
    family: ClassVar[str] = "progressive"

    def __post_init__(self) -> None:
        low, high, scale = self.guidance_low, self.guidance_high, self.guidance
        if low > high:
            raise UserError(f"guidance_low = {low:g} must be at most guidance_high = {high:g}")
        if not self.embed_guidance and low != high:
            raise UserError(
                f"embed_guidance = false learns one scale, but guidance_low = {low:g} and guidance_high = {high:g} are two"
            )
        if scale is not None and not low <= scale <= high:
            trained = f"guidance_low = {low:g} to guidance_high = {high:g}"
            raise UserError(f"guidance = {scale:g} is outside what the student is trained for, {trained}")
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")

    def setup(self, pipeline: Pipeline) -> None:
        if pipeline.embeds_guidance:
            raise UserError(
                f"this pipeline's network has its guidance scale as an input already, so there is no guided teacher for "
                f"guidance_low = {self.guidance_low:g} to guidance_high = {self.guidance_high:g}; begin with progressive"
            )
        self.teacher: Predicts = Guided(pipeline.frozen(), self.guidance_low)
        self.student = pipeline.trainable("student", guidance_embedding=self.embed_guidance)
        scale = pipeline.default_guidance if self.guidance is None else self.guidance
        self.told = min(max(scale, self.guidance_low), self.guidance_high) if self.embed_guidance else 1.0

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    def sampler(self, steps: int | None = None) -> FewStep:
        """The teacher's own DDIM steps, one call each."""
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise UserError(f"this student is sampled in 1 to steps = {self.steps} steps, not {steps}")
        return FewStep(even_times(steps, self.student.process, self.shift), gamma=0.0, guidance=self.told)

    def loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        process, x0 = self.student.process, batch.latents
        t = uniform_times(process, len(x0), shift=self.noise_shift, device=x0.device)
        scale = drawn_scales(self.guidance_low, self.guidance_high, len(x0), x0.device)
        xt = noised(process, x0, torch.randn_like(x0), t)
        with torch.no_grad():
            target = self.teacher(xt, t, batch.condition, guidance=scale).x0
        prediction = self.student(xt, t, batch.condition, guidance=scale if self.embed_guidance else None)
        return {"x0": squared(prediction.x0, target, truncated_snr(process, t, x0))}
