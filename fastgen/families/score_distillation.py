"""Score distillation: a few-step student moves along the difference between a teacher and a fake score of its own samples.

The family of DMD, DMD2, f-distill, SwiftBrush, TDM, Phased DMD and SiD. Methods say how the difference of the two scores
becomes the student's loss, and what else there is; times, networks, backward simulation, the fake score's loss and the two
players are here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.critics import ScoreCritic
from fastgen.denoiser import Condition, Guided, Predicts
from fastgen.errors import UserError
from fastgen.losses import denoising, distribution_matching, record_scores, shared_choice, uniform_times
from fastgen.method import Batch, Loss, Method, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import Prediction, Process, unshift_time
from fastgen.samplers import FewStep, even_times, timesteps_to_times


def call_times(process: Process, steps: int, timesteps: Sequence[int] = (), shift: float = 1.0) -> tuple[float, ...]:
    """The times of a student's calls: those of diffusers' `timesteps`, or `steps` even ones moved towards noise by `shift`.

    Raises UserError for timesteps that the process does not have.
    """
    if not timesteps:
        return even_times(steps, process, shift)
    last = float(process.timestep(torch.ones((), dtype=torch.float64)))
    if timesteps[0] > last:
        raise UserError(f"timesteps begin at {timesteps[0]}, but the pipeline's last is {last:g}")
    return timesteps_to_times(process, timesteps)


@dataclass
class ScoreDistillation(Method):
    """A student, a teacher, and a fake score that learns to denoise what the student makes.

    After `setup` there are `process`, `device`, `times` (of the student's calls), `teacher` (guided), `student`, `fake`
    (the fake score as it is asked), `critic` (the module that the fake score's player trains) and `told` (the guidance that
    a network which embeds it is told; else 1).
    """

    steps: int = field(default=4, metadata={"help": "network calls a sample, evenly spaced in time"})
    timesteps: tuple[int, ...] = field(
        default=(), metadata={"help": "the calls' timesteps, such as [999, 749, 499, 249], in place of steps"}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    student_every: int = field(default=1, metadata={"help": "updates of the fake score for one of the student"})
    fake_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rate of the fake score over the student's", "above": 0}
    )
    low: float = field(default=0.02, metadata={"help": "least time at which the scores are compared"})
    high: float = field(default=0.98, metadata={"help": "greatest time at which the scores are compared"})
    shift: float = field(default=1.0, metadata={"help": "moves the student's steps towards noise, for flow models", "above": 0})
    noise_shift: float = field(default=1.0, metadata={"help": "moves the times of all losses towards noise", "above": 0})

    family: ClassVar[str] = "distribution matching"
    gamma: ClassVar[float] = 1.0
    """How the student goes from call to call: 1 re-noises its clean estimate, 0 follows the ODE."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        decreasing = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if self.timesteps and (not decreasing or self.timesteps[-1] < 0):
            raise UserError(f"timesteps must decrease and not be negative, not {list(self.timesteps)}")
        if self.timesteps and len(self.timesteps) != self.steps:
            self.refuse_idle(f"beside timesteps = {list(self.timesteps)}", "steps")
        if self.timesteps and self.shift != 1:
            raise UserError(
                f"timesteps = {list(self.timesteps)} are taken as they are, without shift = {self.shift:g}; drop one"
            )
        if self.student_every < 1:
            raise UserError(f"student_every must be at least 1, not {self.student_every}")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"low = {self.low:g} and high = {self.high:g} must be times, 0 <= low < high <= 1")

    def setup(self, pipeline: Pipeline) -> None:
        self.process, self.device = pipeline.process, pipeline.device
        self.times = self.call_times()
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        self.teacher: Predicts = Guided(pipeline.frozen(), guidance)
        self.student, fake = pipeline.trainable("student"), pipeline.trainable("fake_score")
        self.told = guidance if self.student.embeds_guidance else 1.0
        self.fake: Predicts = Guided(fake, self.told)
        self.critic = ScoreCritic(fake)

    def call_times(self) -> tuple[float, ...]:
        """The times of the student's calls on `process`."""
        return call_times(self.process, self.steps, self.timesteps, self.shift)

    def players(self) -> Sequence[Player]:
        return [
            Player("fake_score", self.critic, self.fake_loss, lr_scale=self.fake_lr_scale),
            Player("student", self.student, self.student_loss, every=self.student_every),
        ]

    def sampler(self, steps: int | None = None) -> FewStep:
        if steps not in (None, len(self.times)):
            raise UserError(f"this student was trained for {len(self.times)} steps, not for {steps}")
        return FewStep(self.times, gamma=self.gamma, guidance=self.told)

    def last_call(self, batch: Batch) -> tuple[Prediction, int]:
        """Backward simulation: the student sampled up to a random call, the same on all processes, and which call it was.

        The prediction has the graph of that call alone.
        """
        noise = torch.randn(batch.shape, device=self.device)
        exit_at = shared_choice(len(self.times), self.device)
        seen: list[Prediction] = []
        self.sampler().sample(self.student, noise, batch.condition, exit_at=exit_at, watch=seen.append)
        return seen[-1], exit_at

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean estimate [B, ...] at a random call of its own sampler, with the graph of that call alone."""
        return self.last_call(batch)[0].x0

    def fake_loss(self, batch: Batch) -> Loss:
        """The fake score learns to denoise the student's samples."""
        with torch.no_grad():
            x = self.generate(batch)
        t = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device)
        return {"score": denoising(self.fake, x, torch.randn_like(x), t, batch.condition)}

    @abstractmethod
    def student_loss(self, batch: Batch) -> Loss:
        """The student's loss, which takes gradients through `generate` or `last_call`."""

    def score_times(self, count: int) -> Tensor:
        """Times [B] between `low` and `high` at which the scores are compared."""
        return self.times_after(0.0, count, self.high)

    def matching(self, x: Tensor, condition: Condition) -> Tensor:
        """The distribution matching loss of the student's samples `x` (DMD2, equation 2)."""
        t = self.score_times(len(x))
        return distribution_matching(x, t, condition, self.fake, self.teacher)

    def compared(
        self, prediction: Prediction, s: Tensor, t: Tensor, fake: Predicts, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """Clean estimates of `fake` and the teacher for where the student's `prediction` lands at time `s` [B], noised to `t`.

        At s = 0 that is the student's clean estimate with noise added. Without gradient.
        """
        with torch.no_grad():
            xs = prediction.at(s)
            xt = self.process.diffuse(xs, torch.randn_like(xs), s, t)
            estimates = fake(xt, t, condition).x0, self.teacher(xt, t, condition).x0
            clean = s.view(-1, *[1] * (xs.ndim - 1)) == 0  # Elsewhere the estimates are of another x0.
            record_scores(torch.where(clean, prediction.x0, torch.nan), *estimates, t)
            return estimates

    def times_after(self, s: float, count: int, high: float) -> Tensor:
        """`count` times between the later of `s` and `low`, and `high`, uniform but for `noise_shift`."""
        low = max(s, self.low)
        edges = unshift_time(torch.tensor([low, max(low, high)], dtype=torch.float64), self.noise_shift).tolist()
        return uniform_times(self.process, count, low=edges[0], high=edges[1], shift=self.noise_shift, device=self.device)

    def end_of(self, call: int) -> float:
        """The time at which a call of the student ends: that of the next, or 0."""
        return self.times[call + 1] if call + 1 < len(self.times) else 0.0
