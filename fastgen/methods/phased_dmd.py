"""Phased DMD: distribution matching in phases, each at the noise level where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser, Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import contrast, level_denoising
from fastgen.method import Batch, Loss, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import Kind, Prediction, Process
from fastgen.samplers import FewStep, SchedulerSpec


class Experts(Denoiser):
    """Several denoisers as one: `experts[i]` answers at times above `edges[i]` and up to the edge before."""

    def __init__(self, experts: Sequence[Denoiser], edges: Sequence[float]):
        """`edges` decrease and end with 0, one for each expert."""
        first = experts[0]
        own = nn.ModuleList(experts)
        super().__init__(
            *(first.network, first.call, first.process, first.kind), own=own, embeds_guidance=first.embeds_guidance
        )
        self.experts, self.edges, self.guide = list(experts), tuple(edges), first.guide

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """As `Denoiser.forward`. Raises ValueError for times of a batch that belong to different experts."""
        first, last = (self.expert_at(float(time)) for time in (t.max(), t.min()))
        if first != last:
            raise ValueError(f"times from {float(t.min()):g} to {float(t.max()):g} belong to different experts")
        answer: Prediction = self.experts[first](xt, t, condition, guidance=guidance, features=features, end=end)
        return answer

    def expert_at(self, time: float) -> int:
        """Which expert answers at `time`; a float32 time is only near its edge."""
        return sum(time <= edge + 1e-6 for edge in self.edges[:-1])


@dataclass(frozen=True)
class ExpertSteps(FewStep):
    """`FewStep` of a student of several networks."""

    def scheduler(self, process: Process, kind: Kind) -> SchedulerSpec:
        raise UserError(
            "no export holds a student of several networks, and this one has an expert for each phase; "
            "to export a student, train it with experts = false"
        )


@dataclass
class PhasedDMD(ScoreDistillation):
    """Phased DMD, score matching within subintervals (Fan et al. 2025).

    The student's calls, steps of its own ODE, are divided into phases. A call made with gradient jumps to the end s of its
    phase; there the student is to have the teacher's marginal. The sample at s is diffused on to any later time t, and
    compared by the guided teacher and a fake score of the phase's own, which learns from samples known at s alone (the target
    of `fastgen.losses.level_target`; for a flow their velocity). At s = 0 all of it is DMD2 without its GAN term.

    With `experts` each phase has a student network of its own; a run of such can be sampled, not exported, and so not measured.
    Differences from the authors' paper: the phases learn side by side, one call a turn, not one after another, so that a
    later phase starts from where the earlier one is now, and every fake score is fresh by being its phase's own; without
    `experts` one network serves all phases; a fake score learns from where the last call of its phase ends, and judges jumps
    there from all of them; the gradient is normalised as DMD's. Their guidance is 4, with two phases
    of two steps; the student a LoRA of rank 64 at 5e-5, the fake score whole at 4e-7, five updates for one.
    """

    phases: int = field(default=2, metadata={"help": "parts of the student's steps, each with a fake score", "at_least": 1})
    experts: bool = field(default=False, metadata={"help": "a student network for each phase; cannot be exported or measured"})
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

    def sampler(self, steps: int | None = None) -> FewStep:
        plain = super().sampler(steps)
        return ExpertSteps(plain.times, plain.gamma, plain.guidance) if self.experts else plain

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
