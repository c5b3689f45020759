"""Continuous-time consistency: a student's clean estimate must not change along a trajectory, in the limit of no step at all.

The family of sCM, rCM and SANA-Sprint (Lu and Song 2025; Zheng et al. 2025; Chen et al. 2025). All is done in TrigFlow, x =
cos(angle) x0 + sin(angle) eps at unit data scale, in which any network is seen through `Retimed`; there F = cos(angle) eps -
sin(angle) x0 is both the network's answer and, for a perfect one, the trajectory's speed. The consistency function is f =
cos(angle) x - sin(angle) F. The papers' data has a standard deviation sigma_data; here that only divides the ratio of noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Guided, Predicts, Retimed
from fastgen.errors import UserError
from fastgen.families.derivatives import TakesDerivatives
from fastgen.losses import squared, wide
from fastgen.method import Batch, Loss, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import Process, Trig
from fastgen.samplers import FewStep
from fastgen.tangents import answer_and_derivative

RIGHT = math.pi / 2
TRIG = Trig()
MOST_STEPS = 8
SECOND = 1.3
"""The second of two sampling angles (sCM, section 5; SANA-Sprint's `intermediate_timesteps`)."""

Weighting = Literal["none", "prior", "adaptive"]


def trig_times(ratio: Tensor) -> Tensor:
    """The times of TrigFlow [B], float32, whose noise-to-signal ratio is `ratio`."""
    return TRIG.time_at(ratio.double()).float()


def log_normal_times(
    count: int, mean: float, std: float, sigma_data: float, device: torch.device | str | None = None
) -> Tensor:
    """`count` times of TrigFlow with sigma_data tan(angle) = exp(n), n ~ N(mean, std^2) (sCM, algorithm 1)."""
    return trig_times((mean + std * torch.randn(count, device=device)).exp() / sigma_data)


def own_times(process: Process, angles: Sequence[float]) -> tuple[float, ...]:
    """The times of `process`, of those it was trained at, with the noise-to-signal ratios of TrigFlow's `angles`; pi / 2 is 1.

    Raises UserError for angles that fall on one time.
    """
    ratios = torch.tensor(angles, dtype=torch.float64).tan()
    times = process.snap(torch.where(torch.tensor(angles) >= RIGHT - 1e-6, 1.0, process.time_at(ratios))).tolist()
    if any(a <= b for a, b in pairwise(times)):
        raise UserError(f"angles = {[round(angle, 4) for angle in angles]} are too close to tell apart for this network")
    return tuple(times)


class AdaptiveWeight(nn.Module):
    """The logarithm of a loss weight as a function of the angle (sCM, section 4.2), 0 at first and never beyond `bound`.

    Unbounded it runs away at angles where the tangent vanishes, such as those beyond the end of a noise table.
    """

    def __init__(self, waves: int = 8, bound: float = 3.0):
        super().__init__()
        self.bound = bound
        self.register_buffer("rates", torch.arange(1, waves + 1, dtype=torch.float32), persistent=False)
        self.out = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    rates: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """[B] from TrigFlow times [B]."""
        phase = t.float()[:, None] * math.pi * self.rates
        raw = wide(self.out(torch.cat([phase.cos(), phase.sin()], 1).to(self.out.weight)).squeeze(1))
        return self.bound * torch.tanh(raw / self.bound)


@dataclass
class ContinuousConsistency(TakesDerivatives):
    """A student whose tangent along the guided teacher's trajectories is brought to zero.

    After `setup` there are `student`, `flow` (the student in TrigFlow), `teacher` (guided, in TrigFlow), `times` (of the
    student's own calls), `told` (the guidance that the student is told in sampling; 1 where it is told none) and `weights`
    (what the student's player trains).
    """

    steps: int = field(default=2, metadata={"help": f"network calls a sample, 1 to {MOST_STEPS}"})
    angles: tuple[float, ...] = field(
        default=(), metadata={"help": "TrigFlow angles of the calls from pi / 2 down, such as [1.5708, 1.3], in place of steps"}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    embed_guidance: bool = field(default=False, metadata={"help": "make the guidance scale an input of the student"})
    guidance_scales: tuple[float, ...] = field(
        default=(), metadata={"help": "scales drawn in training, one a sample, for a student that is told them", "at_least": 1}
    )
    noise_mean: float = field(default=0.2, metadata={"help": "mean of the log of sigma_data tan(angle) in training"})
    noise_std: float = field(default=1.6, metadata={"help": "its standard deviation", "above": 0})
    sigma_data: float = field(default=0.5, metadata={"help": "sigma_data in the law of the angles", "above": 0})
    warmup: int = field(
        default=10_000, metadata={"help": "updates over which the tangent's own terms are let in", "at_least": 0}
    )
    normaliser: float = field(
        default=0.1, metadata={"help": "the tangent is divided by its root mean square plus this", "above": 0}
    )
    weighting: Weighting = field(
        default="none",
        metadata={"help": "weight over angles: none, prior (1 / (sigma_data tan)), adaptive (that times a learnt one)"},
    )

    family: ClassVar[str] = "consistency"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps must be 1 to {MOST_STEPS}, not {self.steps}")
        falling = all(a > b for a, b in pairwise(self.angles))
        if self.angles and not (falling and self.angles[-1] > 0 and self.angles[0] <= RIGHT + 1e-4):
            raise UserError(f"angles must decrease, from pi / 2 = {RIGHT:.4f} at most and above 0, not {list(self.angles)}")
        if self.angles and len(self.angles) != self.steps:
            self.refuse_idle(f"beside angles = {list(self.angles)}", "steps")
        if self.guidance is not None and self.guidance_scales:
            low, high = min(self.guidance_scales), max(self.guidance_scales)
            if not low <= self.guidance <= high:
                scales = list(self.guidance_scales)
                raise UserError(
                    f"guidance = {self.guidance:g} is outside what the student is trained for, guidance_scales = {scales}"
                )

    def setup(self, pipeline: Pipeline) -> None:
        self.process, self.device = pipeline.process, pipeline.device
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        if self.guidance_scales:
            guidance = min(max(guidance, min(self.guidance_scales)), max(self.guidance_scales))
        self.scale = guidance
        self.teacher: Predicts = Retimed(Guided(pipeline.frozen(), guidance), TRIG)
        self.student = pipeline.trainable("student", guidance_embedding=self.embed_guidance)
        if self.guidance_scales and not self.student.embeds_guidance:
            scales = f"guidance_scales = {list(self.guidance_scales)}"
            raise UserError(f"{scales} need embed_guidance = true, which gives the student that input")
        self.flow: Predicts = Retimed(self.student, TRIG)
        self.told = guidance if self.student.embeds_guidance else 1.0
        self.times = own_times(self.process, self.calls(None))
        self.learnt = AdaptiveWeight().to(self.device) if self.weighting == "adaptive" else None
        self.weights: nn.Module = self.student
        if self.learnt is not None:
            self.weights = nn.ModuleDict({"student": self.student, "weight": self.learnt})
        self.share = 1.0

    def calls(self, steps: int | None) -> tuple[float, ...]:
        """The angles of the student's calls, its own or `steps` of them."""
        if steps is None and self.angles:
            return self.angles
        steps = self.steps if steps is None else steps
        return (RIGHT, SECOND) if steps == 2 else tuple(RIGHT * (1 - i / steps) for i in range(steps))

    def players(self) -> Sequence[Player]:
        return [Player("student", self.weights, self.loss)]

    def sampler(self, steps: int | None = None) -> FewStep:
        """Re-noising between calls, at the student's own times with the angles' noise-to-signal ratios."""
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            raise UserError(f"a consistency model is sampled in 1 to {MOST_STEPS} steps, not {steps}")
        times = self.times if steps in (None, len(self.times)) else own_times(self.process, self.calls(steps))
        return FewStep(times, gamma=1.0, guidance=self.told)

    def advance(self, step: int, total: int) -> bool:
        self.share = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return False

    def loss(self, batch: Batch) -> Loss:
        """The student's loss."""
        return {"consistency": self.consistency(batch)}

    def draw_scales(self, count: int) -> Tensor | None:
        """The guidance [B] of each sample of a batch where the student is told it; else None."""
        if not self.student.embeds_guidance:
            return None
        scales = torch.tensor(self.guidance_scales or (self.scale,), device=self.device)
        return scales[torch.randint(len(scales), (count,), device=self.device)]

    def speed(self, xt: Tensor, t: Tensor, condition: Condition, x0: Tensor, eps: Tensor, told: Tensor | None) -> Tensor:
        """dx / dangle at `xt`, without gradient: the guided teacher's."""
        return self.teacher(xt, t, condition, guidance=told).v

    def consistency(self, batch: Batch) -> Tensor:
        """The loss whose gradient with respect to F is that of -F g, times the weight (sCM, equation 8 and algorithm 1)."""
        assert batch.latents is not None
        x0, condition = wide(batch.latents), batch.condition
        t = log_normal_times(len(x0), self.noise_mean, self.noise_std, self.sigma_data, x0.device)
        eps, told = torch.randn_like(x0), self.draw_scales(len(x0))
        xt = TRIG.add_noise(x0, eps, t)
        with torch.no_grad():
            speed = self.speed(xt, t, condition, x0, eps, told)
        answer, turning = self.answer_and_turning(xt, t, condition, speed, told)
        g = self.normalised(self.direction(xt, t, answer.detach(), speed, turning))
        return self.weighted(answer, answer.detach() + g, t)

    def answer_and_turning(
        self, xt: Tensor, t: Tensor, condition: Condition, speed: Tensor, told: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The student's answer F, and dF / dangle along `speed`, without gradient."""
        return answer_and_derivative(
            lambda index: lambda x, t: self.flow(x, t, condition, guidance=told).v,
            *(self.flow, xt, t, speed, 1 / RIGHT),
            way=self.tangent,
            step=self.tangent_step,
            one_pass=self.one_pass,
        )

    def direction(self, xt: Tensor, t: Tensor, answer: Tensor, speed: Tensor, turning: Tensor) -> Tensor:
        """The tangent cos(angle) df / dangle at `xt`, its own terms let in by `share` (sCM, algorithm 1)."""
        cos, sin = TRIG.coefficients(t, xt)
        return -self.pull(cos, sin) * (answer - speed) - self.share * cos * sin * (xt + turning)

    def pull(self, cos: Tensor, sin: Tensor) -> Tensor:
        """The weight of the difference from the teacher."""
        return cos.square()

    def normalised(self, g: Tensor) -> Tensor:
        """`g` over its root mean square, sample by sample, plus `normaliser`."""
        norm = g.square().mean(dim=tuple(range(1, g.ndim)), keepdim=True).sqrt()
        return g / (norm + self.normaliser)

    def weighted(self, answer: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squares under the weight over angles."""
        if self.weighting == "none":
            return squared(answer, target)
        prior = 1 / (self.sigma_data * TRIG.ratio(t.double())).float().view(-1, *[1] * (answer.ndim - 1))
        if self.learnt is None:
            return squared(answer, target, prior)
        log = self.learnt(t)
        return squared(answer, target, prior * log.exp().view_as(prior)) - log.mean()
