"""Flash Diffusion: the student says in one call what the guided teacher makes of the same input in all its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.critics import FeatureCritic
from fastgen.denoiser import Condition, Guided
from fastgen.errors import UserError
from fastgen.families.adversarial import feature_critic, layers_for
from fastgen.families.stages import Staged
from fastgen.losses import (
    distance,
    distribution_matching,
    drawn_scales,
    least_squares_critic,
    least_squares_student,
    listen,
    noised,
    shared_choice,
    uniform_times,
)
from fastgen.method import Batch, Loss, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.rollouts import time_grid, walk
from fastgen.samplers import FewStep, even_times, fewer_calls

LEVELS = (0.011, 0.251, 0.501, 0.751)
"""The times at which the discriminator is shown samples: timesteps 10, 250, 500 and 750 of a table."""


@dataclass
class Flash(Staged):
    """Flash Diffusion (Chadebec et al. 2025).

    Data is noised to a point of the teacher's grid, and the student's clean estimate there is pulled to where the teacher, with
    a guidance scale drawn for each batch, ends when it goes down the rest of the grid. The start is drawn from as many
    Gaussians on the grid as the student has steps, weighted by stage: first the cleaner half, the noisiest the most in the
    last. From the second stage on there are a distribution matching term, whose fake score is the student itself, and a
    least squares GAN on the frozen teacher's features.

    Differences from the authors' code: the teacher's steps are DDIM's or Euler's, theirs DPM-Solver++'s on VP tables; the
    distance is in latents, theirs LPIPS on a decoded crop of them; discriminator and student move in every update, theirs in
    turns of one; the boundary scalings of the consistency form are left out (c_skip is below 1e-5 on this grid); the
    matching term is in x0 for flow models too, where their SD3 code takes a velocity for it. Their recipe for SD3 has
    guidance 7 to 13 and GAN weights 0, 0.1, 0.3, 0.5.
    """

    grid: int = field(default=32, metadata={"help": "steps of the teacher from noise to data"})
    mode_weights: tuple[tuple[float, ...], ...] = field(
        default=((0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25, 0.25, 0.25, 0.25), (0.4, 0.2, 0.2, 0.2)),
        metadata={"help": "for each stage, how often a start is near each of the student's steps, the noisiest first"},
    )
    mode_variance: float = field(
        default=0.5, metadata={"help": "how far from them, in steps of the grid: exp(-distance^2 / this)", "above": 0}
    )
    guidance_low: float = field(default=3.0, metadata={"help": "least guidance scale of the teacher, 1 = off", "at_least": 1})
    guidance_high: float = field(default=13.0, metadata={"help": "greatest guidance scale of the teacher"})
    huber_c: float = field(
        default=0.0, metadata={"help": "where a pseudo-Huber distance turns from square to absolute; 0: square", "at_least": 0}
    )
    matching_weights: tuple[float, ...] = field(
        default=(0.0, 0.3, 0.5, 0.7), metadata={"help": "for each stage, weight of distribution matching", "at_least": 0}
    )
    gan_weights: tuple[float, ...] = field(
        default=(0.0, 0.1, 0.2, 0.3), metadata={"help": "for each stage, weight of the GAN term", "at_least": 0}
    )
    real: Literal["data", "teacher"] = field(default="data", metadata={"help": "what the discriminator is to take for real"})
    shift: float = field(default=1.0, metadata={"help": "moves grid and steps towards noise, for flow models", "above": 0})

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})
    family: ClassVar[str] = "distribution matching"
    renews: ClassVar[bool] = False  # one optimisation, whose terms change weight

    def __post_init__(self) -> None:
        self.check_stages("matching_weights", "gan_weights")
        self.modes = len(self.mode_weights[0]) if self.mode_weights else 0
        if not self.modes or any(len(row) != self.modes or min(row) < 0 or not sum(row) for row in self.mode_weights):
            raise UserError("mode_weights must be rows of one length, none negative and none of zeros alone")
        if self.grid < self.modes or self.grid % self.modes:
            raise UserError(f"grid = {self.grid} must be a multiple of the {self.modes} steps that mode_weights names")
        if (low := self.guidance_low) > (high := self.guidance_high):
            raise UserError(f"guidance_low = {low:g} must be at most guidance_high = {high:g}")

    @property
    def stages(self) -> tuple[tuple[float, ...], ...]:
        return self.mode_weights

    def setup(self, pipeline: Pipeline) -> None:
        self.process, self.device = pipeline.process, pipeline.device
        self.times = time_grid(f"grid = {self.grid}", self.grid, self.process, self.shift, self.device)
        self.teacher, self.student = pipeline.frozen(), pipeline.trainable("student")
        middle = min(max(pipeline.default_guidance, self.guidance_low), self.guidance_high)
        self.told = middle if self.student.embeds_guidance else 1.0
        self.levels = self.process.snap(torch.tensor(LEVELS, device=self.device))
        self.critic: FeatureCritic | None = None
        if any(self.gan_weights):
            layers = layers_for(f"gan_weights = {list(self.gan_weights)}", pipeline, "set all to 0")
            self.critic = feature_critic(pipeline, self.teacher, layers, width=128)

    def players(self) -> Sequence[Player]:
        critic = [Player("critic", self.critic, self.critic_loss)] if self.critic is not None else []
        return [*critic, Player("student", self.student, self.student_loss)]

    def sampler(self, steps: int | None = None) -> FewStep:
        """The calls fall on the modes of the starts, all of them or evenly fewer."""
        return FewStep(even_times(fewer_calls(self.modes, steps), self.process, self.shift), gamma=1.0, guidance=self.told)

    def start_probabilities(self) -> Tensor:
        """How often each step of the grid, [grid], is the start in the present stage."""
        places, centres = torch.arange(self.grid), torch.arange(0, self.grid, self.grid // self.modes)
        weights = torch.tensor(self.mode_weights[self.stage], dtype=torch.float64)
        mass = (weights * torch.exp(-((places[:, None] - centres).double() ** 2) / self.mode_variance)).sum(1)
        return mass / mass.sum()

    def start(self, batch: Batch) -> tuple[Tensor, int]:
        """The input of student and teacher, [B, ...], and its position on the grid, the same on all processes."""
        assert batch.latents is not None
        position = shared_choice(self.grid, self.device, self.start_probabilities())
        t = self.times[position].expand(len(batch.latents))
        return noised(self.process, batch.latents, torch.randn_like(batch.latents), t), position

    def guided(self, count: int) -> Guided:
        """The teacher with one guidance scale for a batch of `count`."""
        scale = drawn_scales(self.guidance_low, self.guidance_high, 1, self.device)
        return Guided(self.teacher, 1.0 if self.guidance_low == self.guidance_high == 1 else scale.expand(count))

    def answer(self, xt: Tensor, position: int, condition: Condition) -> Tensor:
        """The student's clean estimate."""
        return Guided(self.student, self.told)(xt, self.times[position].expand(len(xt)), condition).x0

    @torch.no_grad()
    def target(self, xt: Tensor, position: int, condition: Condition) -> Tensor:
        """Where the guided teacher ends when it starts from `xt`."""
        begin = torch.full((len(xt),), position, device=xt.device)
        return walk(self.guided(len(xt)), xt, self.times, begin, self.grid - position, condition)

    def student_loss(self, batch: Batch) -> Loss:
        xt, position = self.start(batch)
        target = self.target(xt, position, batch.condition)
        x = self.answer(xt, position, batch.condition)
        terms = {"distillation": distance(x, target, self.huber_c)}
        if weight := self.matching_weights[self.stage]:
            terms["matching"] = weight * self.matching(x, batch.condition)
        if (weight := self.gan_weights[self.stage]) and self.critic is not None:
            t, eps = self.level(len(x)), torch.randn_like(x)
            logits = self.critic(self.process.add_noise(x, eps, t), t, batch.condition)
            terms["gan"] = weight * 2 * least_squares_student(logits.sigmoid())
        return terms

    def matching(self, x: Tensor, condition: Condition) -> Tensor:
        """Distribution matching with the student in the place of the fake score."""
        t, fake = uniform_times(self.process, len(x), device=x.device), Guided(self.student, self.told)
        with listen(None):  # The student has not learnt to denoise what it makes, as a fake score has.
            # The authors' square has no half in front of it.
            return 2 * distribution_matching(x, t, condition, fake, self.guided(len(x)))

    def critic_loss(self, batch: Batch) -> Loss:
        assert self.critic is not None and batch.latents is not None
        with torch.no_grad():
            xt, position = self.start(batch)
            fake = self.answer(xt, position, batch.condition)
            real = batch.latents if self.real == "data" else self.target(xt, position, batch.condition)
        t, eps = self.level(len(fake)).repeat(2), torch.randn_like(fake).repeat(2, *[1] * (fake.ndim - 1))
        xt = self.process.add_noise(torch.cat([fake, real.to(fake)]), eps, t)
        logits_fake, logits_real = self.critic(xt, t, Condition.cat([batch.condition, batch.condition])).chunk(2)
        return {"gan": least_squares_critic(logits_real.sigmoid(), logits_fake.sigmoid(), t[: len(fake)])}

    def level(self, count: int) -> Tensor:
        """For each sample, one of the times at which the discriminator looks."""
        return self.levels[torch.randint(len(self.levels), (count,), device=self.device)]
