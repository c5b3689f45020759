"""Phased DMD: distribution matching in phases, each at the noise level where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.denoiser import Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import contrast, level_denoising
from fastgen.method import Batch, Loss, Player
from fastgen.pipelines.base import Pipeline
from fastgen.pipelines.experts import Experts
from fastgen.process import Prediction


@dataclass
class PhasedDMD(ScoreDistillation):
    """Phased DMD, score matching within subintervals (Fan et al. 2025).

    The student's calls, steps of its own ODE, are divided into phases. A call made with gradient jumps to the end s of its
    phase; there the student is to have the teacher's marginal. The sample at s is diffused on to any later time t, and
    compared by the guided teacher and a fake score of the phase's own, which learns from samples known at s alone (the target
    of `fastgen.losses.level_target`; for a flow their velocity). At s = 0 all of it is DMD2 without its GAN term.

    With `experts` each phase has a student network of its own. An export holds each, and its card says how to change from one
    to the next; being no pipeline by itself it is not measured.

    Differences from the authors' paper: the phases learn side by side, one call a turn, not one after another, so that a
    later phase starts from where the earlier one is now, and every fake score is fresh by being its phase's own; without
    `experts` one network serves all phases; a fake score learns from where the last call of its phase ends, and judges jumps
    there from all of them; the gradient is normalised as DMD's. Their guidance is 4, with two phases of two steps; the
    student a LoRA of rank 64 at 5e-5, the fake score whole at 4e-7, five updates for one.
    """

    phases: int = field(default=2, metadata={"help": "parts of the student's steps, each with a fake score", "at_least": 1})
    experts: bool = field(default=False, metadata={"help": "a student network for each phase; cannot be measured"})
    student_every: int = field(default=5, metadata={"help": "updates of the fake scores for one of the student"})
    margin: float = field(
        default=0.02, metadata={"help": "how far above a phase's end the scores are compared at least", "at_least": 0}
    )

    gamma: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        calls = len(self.timesteps) or self.steps
        if calls % self.phases:
            raise UserError(f"phases = {self.phases} must divide the {calls} steps of the student")

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        length = len(self.times) // self.phases
        self.ends = [self.end_of(length * (k + 1) - 1) for k in range(self.phases)]
        if any(end + self.margin >= self.high for end in self.ends):
            raise UserError(f"margin = {self.margin:g} leaves no room between the end of a phase and high = {self.high:g}")
        others = [pipeline.trainable("fake_score") for _ in range(self.phases - 1)]
        self.scores = nn.ModuleList([self.critic.fake, *others])
        self.fakes: list[Predicts] = [Guided(fake, self.told) for fake in (self.critic.fake, *others)]
        if self.experts:
            students = [self.student, *(pipeline.trainable("student") for _ in range(self.phases - 1))]
            self.student = Experts(students, self.ends)

    def players(self) -> Sequence[Player]:
        fake, student = super().players()
        return [Player(fake.name, self.scores, fake.loss, lr_scale=fake.lr_scale), student]

    def times_in(self, phase: int, count: int) -> Tensor:
        """Times [B] at which samples known at the end of `phase` are looked at: up to the noisiest, whichever phase."""
        end = self.ends[phase]
        return self.times_after(end + self.margin if end else 0.0, count, self.high)

    def fake_loss(self, batch: Batch) -> Loss:
        """Every phase's fake score learns from where that phase ends on one walk through all steps."""
        seen: list[Prediction] = []
        with torch.no_grad():
            noise = torch.randn(batch.shape, device=self.device)
            self.sampler().sample(self.student, noise, batch.condition, watch=seen.append)
        terms, length = {}, len(self.times) // self.phases
        for phase, (fake, end) in enumerate(zip(self.fakes, self.ends, strict=True)):
            t = self.times_in(phase, len(noise))
            s = t.new_full(t.shape, end)
            xs = seen[length * (phase + 1) - 1].at(s)
            terms[f"score_{phase}"] = level_denoising(fake, xs, torch.randn_like(xs), s, t, batch.condition)
        return terms

    def student_loss(self, batch: Batch) -> Loss:
        prediction, exit_at = self.last_call(batch)
        phase = exit_at * self.phases // len(self.times)
        t = self.times_in(phase, len(prediction.xt))
        s = t.new_full(t.shape, self.ends[phase])
        fake, real = self.compared(prediction, s, t, self.fakes[phase], batch.condition)
        return {"dmd": contrast(prediction.x0, fake, real)}
