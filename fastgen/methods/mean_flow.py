"""MeanFlow: a network that is told both ends of a step learns the mean velocity between them from its own derivative."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Predicts, Retimed
from fastgen.errors import UserError
from fastgen.families.derivatives import TakesDerivatives
from fastgen.families.mean_velocity import MeanVelocities
from fastgen.losses import logit_normal_times, wide
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline
from fastgen.process import Flow
from fastgen.samplers import MeanVelocity, even_times
from fastgen.tangents import answer_and_derivative

FLOW = Flow()


@dataclass
class MeanFlow(TakesDerivatives, MeanVelocities):
    """MeanFlow (Geng et al. 2025), as distillation of a teacher or, with `training`, from data alone.

    The mean velocity u from t down to s satisfies u = v - (t - s) du / dt along the trajectory (equation 6). The right-hand
    side, with the derivative taken through the network and the teacher's guided velocity for v, is the target. The squared
    error is divided by its own size to the power `power` (equation 22).

    Differences from the paper: the velocity is the teacher's, and the two times differ in three quarters of the samples, as in
    distillations of text-to-image models (Pu et al. 2025), not in one; errors are means over a sample, not sums; without a
    teacher there is no guidance. A network that is no flow is trained as one, at equal ratios of noise to signal.
    """

    apart: float = field(
        default=0.75, metadata={"help": "share of samples whose two times differ", "at_least": 0, "at_most": 1}
    )
    time_mean: float = field(default=-0.4, metadata={"help": "mean of the logit of the times"})
    time_std: float = field(default=1.0, metadata={"help": "its standard deviation", "above": 0})
    time_shift: float = field(default=1.0, metadata={"help": "moves the times towards noise", "above": 0})
    power: float = field(default=1.0, metadata={"help": "power of the error by which it is divided", "at_least": 0})
    constant: float = field(default=1e-3, metadata={"help": "is added to the error that divides", "above": 0})
    warmup: int = field(default=0, metadata={"help": "updates over which the derivative is let in", "at_least": 0})

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.flow: Predicts = Retimed(self.student, FLOW)
        self.teacher = Retimed(self.teacher, FLOW)
        self.share = 1.0

    def sampler(self, steps: int | None = None) -> MeanVelocity:
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"a mean flow is sampled in at least 1 step, not {steps}")
        return MeanVelocity(even_times(steps, self.process, self.shift), guidance=self.told)

    def advance(self, step: int, total: int) -> bool:
        self.share = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return False

    def draw_times(self, count: int) -> tuple[Tensor, Tensor]:
        """The times t [B] and s [B] at which steps begin and end, t >= s."""
        law = {"mean": self.time_mean, "std": self.time_std, "shift": self.time_shift, "device": self.device}
        one, other = (logit_normal_times(FLOW, count, **law) for _ in range(2))  # type: ignore[arg-type]
        t = torch.maximum(one, other)
        return t, torch.where(torch.rand_like(t) < self.apart, torch.minimum(one, other), t)

    def loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        x0, condition = wide(batch.latents), batch.condition
        t, s = self.draw_times(len(x0))
        eps = torch.randn_like(x0)
        xt = FLOW.add_noise(x0, eps, t)
        speed = self.velocity(x0, eps, xt, t, condition)
        answer, change = self.answer_and_change(xt, t, s, condition, speed)
        target = speed - self.share * (t - s).view(-1, *[1] * (x0.ndim - 1)) * change
        error = (answer - target).square().mean(dim=tuple(range(1, x0.ndim)))
        return {"mean_flow": (error / (error.detach() + self.constant) ** self.power).mean()}

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """The student's mean velocity from `t` down to `s`, flow times [B]."""
        return self.flow(x, t, condition, guidance=self.scales(len(x)), end=s).flow

    def answer_and_change(self, xt: Tensor, t: Tensor, s: Tensor, condition: Condition, speed: Tensor) -> tuple[Tensor, Tensor]:
        """The mean velocity u, and du / dt along the trajectory, s held: forward mode with the tangents (v, 1, 0).

        Samples whose times are one have no use for the latter.
        """
        return answer_and_derivative(
            lambda index: lambda x, t: self.mean_velocity(x, t, s[index], condition[index]),
            *(self.flow, xt, t, speed),
            way=self.tangent,
            step=self.tangent_step,
            one_pass=self.one_pass,
            where=t > s,
        )
