"""Trajectory distribution matching: at the end of every step of its own ODE the student has the teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import contrast, kernel, level_denoising, pseudo_huber, snr, squared
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline
from fastgen.process import Prediction
from fastgen.samplers import even_times


@dataclass
class TDM(ScoreDistillation):
    """Trajectory distribution matching (Luo et al. 2025).

    The student follows its own ODE. One of its calls is made with gradient and jumps to the time s where the next call would
    be; the sample there is diffused on to a time t within the step, where fake score and guided teacher are compared.

    The fake score's own target matters. The authors' is the student's clean estimate, as if x_t were that plus independent
    noise ("clean"); but x_s already holds the noise that the student saw, on which the estimate depends. So their fixed point
    is not the teacher's marginal at s > 0: for N(1.3, 0.4^2) on a flow in two steps its standard deviation at s = 0.5 is about
    0.575, and the teacher's 0.539. The target that only knows x_s ("level"; Phased DMD, Fan et al. 2025) makes it exact.
    The last step, which ends on clean data, is the same for both.

    Differences from the authors' code: the level target by default; all samples of a batch exit at one call, the same on
    all processes; each player makes samples of its own. They start at timestep 799 of 1,000 (`start = 0.8`) from pure
    noise, with guidance 2 to 4.5, a fake score five times as fast as the student, Adam's first beta 0, 500 updates.
    """

    fake_lr_scale: float = field(
        default=5.0, metadata={"help": "learning rate of the fake score over the student's", "above": 0}
    )
    fake_target: Literal["level", "clean"] = field(
        default="level", metadata={"help": "what the fake score learns: the marginal of what it sees, or the authors' target"}
    )
    start: float = field(default=1.0, metadata={"help": "time of the first call", "above": 0, "at_most": 1})
    separate: bool = field(default=True, metadata={"help": "compare scores within the step, not up to the first call"})
    margin: float = field(
        default=0.01, metadata={"help": "how far below the call the scores are compared at most", "at_least": 0}
    )
    huber_c: float = field(
        default=0.0, metadata={"help": "where a pseudo-Huber loss turns from square to absolute; 0: square", "at_least": 0}
    )

    gamma: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps and self.start != 1:
            raise UserError(
                f"timesteps = {list(self.timesteps)} say where the first call is, and so does start = {self.start:g}; drop one"
            )
        self.refuse_idle("in tdm, which compares up to margin below a call", "high")

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        for call, time in enumerate(self.times):
            low, high = max(self.end_of(call), self.low), (time if self.separate else self.times[0]) - self.margin
            if low >= high:
                raise UserError(
                    f"margin = {self.margin:g} and low = {self.low:g} leave no time to compare at in the student's step from "
                    f"{time:.3g} to {self.end_of(call):.3g}"
                )

    def call_times(self) -> tuple[float, ...]:
        if self.start == 1:
            return super().call_times()
        even = torch.tensor(even_times(self.steps, shift=self.shift), dtype=torch.float64)
        return tuple(self.process.snap(self.start * even).tolist())

    def spans(self, exit_at: int, count: int) -> tuple[Tensor, Tensor]:
        """Where call `exit_at` ends, and for each of `count` samples the later time at which it is looked at, both [B]."""
        end = self.end_of(exit_at)
        t = self.times_after(end, count, self.times[exit_at if self.separate else 0] - self.margin)
        return t.new_full((count,), end), t

    def fake_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            prediction, exit_at = self.last_call(batch)
        s, t = self.spans(exit_at, len(prediction.xt))
        if self.fake_target == "clean":
            return {"score": self.clean_denoising(prediction, s, t, batch.condition)}
        xs = prediction.at(s)
        return {"score": level_denoising(self.fake, xs, torch.randn_like(xs), s, t, batch.condition)}

    def clean_denoising(self, prediction: Prediction, s: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The authors' loss: the student's clean estimate, weighted with min(SNR, 5) and an importance weight.

        The weight is the density, per dimension, of the noise that x_t holds of that estimate, over that of the fresh noise.
        """
        x0, seen = prediction.solve()
        xs, eps = prediction.at(s), torch.randn_like(x0)
        xt = self.process.diffuse(xs, eps, s, t)
        _, sigma = self.process.coefficients(t, x0)
        scale, fresh = kernel(self.process, s, t, x0)
        _, sigma_s = self.process.coefficients(s, x0)
        held = (scale * sigma_s * seen + fresh * eps) / sigma
        dims = tuple(range(1, x0.ndim))
        importance = (0.5 * (eps.square() - held.square()).mean(dims, keepdim=True)).exp()
        weight = snr(self.process, t, x0).clamp_max(5) * importance
        return squared(self.fake(xt, t, condition).x0, x0, weight)

    def student_loss(self, batch: Batch) -> Loss:
        prediction, exit_at = self.last_call(batch)
        x0 = prediction.x0
        s, t = self.spans(exit_at, len(x0))
        fake, real = self.compared(prediction, s, t, self.fake, batch.condition)
        if not self.huber_c:
            return {"tdm": contrast(x0, fake, real)}
        scale = (x0.detach() - real).abs().mean(tuple(range(1, x0.ndim)), keepdim=True)
        step, weight = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (real - fake, 1 / scale))
        return {"tdm": pseudo_huber(x0, x0.detach() + step, self.huber_c, weight)}
