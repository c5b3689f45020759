"""Latent consistency distillation: the student's clean estimate is held constant along the guided teacher's trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Denoiser, Guided, Predicts
from fastgen.errors import UserError
from fastgen.losses import noised, pseudo_huber
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.rollouts import walk
from fastgen.samplers import FewStep, even_times

MOST_STEPS = 8
SIGMA_DATA = 0.5


@dataclass
class LCM(Method):
    """Latent consistency models (Luo et al. 2023a), and LCM-LoRA (Luo et al. 2023b) when the student is trained as LoRA.

    From diffused data x_t the teacher takes one guided DDIM step down the solver grid to x_r, with a guidance scale drawn
    for each sample; the student at x_t is pulled towards a target network at x_r. With `embed_guidance` the scale is an
    input of the student (a full network; the scale is then chosen when sampling); without, the range is averaged into the
    student, as in LCM-LoRA.

    The consistency function is c_skip x + c_out x0 with tau = timestep_scaling * 1000 t (equation 9). It only matters at t
    = 0, where it hands back its input: from the first solver point on (tau = 200) c_skip is below 1e-5 and c_out above 1 -
    1e-5, so the sampler, which takes x0, and diffusers' LCMScheduler, which applies the skip with the same scaling, agree.

    Differences from diffusers' scripts: scales are in the convention where 1 is off (theirs plus 1); at t = 1 the input is
    noise alone, as in sampling; the last solver step ends at clean data instead of the table's first entry; the grid is
    evenly spaced from t = 1 whether or not its size divides the table.
    """

    guidance_low: float = field(default=3.0, metadata={"help": "least guidance scale of the teacher, 1 = off"})
    guidance_high: float = field(default=15.0, metadata={"help": "greatest guidance scale of the teacher"})
    embed_guidance: bool = field(default=False, metadata={"help": "make the guidance scale an input of the student"})
    guidance: float | None = field(
        default=None, metadata={"help": "scale told to the student in sampling, where it is an input; none: the pipeline's own"}
    )
    steps: int = field(default=4, metadata={"help": f"network calls a sample, 1 to {MOST_STEPS}"})
    gamma: float = field(
        default=1.0, metadata={"help": "share of noise renewed between calls in sampling, 0 to 1", "at_least": 0, "at_most": 1}
    )
    grid: int = field(default=50, metadata={"help": "points of the solver grid"})
    solver_steps: int = field(default=1, metadata={"help": "steps that the teacher takes from one point to the next"})
    huber_c: float = field(default=1e-3, metadata={"help": "where the pseudo-Huber loss turns from square to absolute"})
    ema_decay: float = field(default=0.0, metadata={"help": "decay of the target network; 0: the student itself, as LCM-LoRA"})
    timestep_scaling: float = field(default=10.0, metadata={"help": "how fast the skip to the input fades", "above": 0})
    shift: float = field(default=1.0, metadata={"help": "moves grid and steps towards noise, for flow models", "above": 0})

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_low <= self.guidance_high:
            low, high = f"guidance_low = {self.guidance_low:g}", f"guidance_high = {self.guidance_high:g}"
            raise UserError(f"{low} must be at least 1 and at most {high}")
        if self.guidance is not None and not self.guidance_low <= self.guidance <= self.guidance_high:
            trained = f"guidance_low = {self.guidance_low:g} to guidance_high = {self.guidance_high:g}"
            raise UserError(f"guidance = {self.guidance:g} is outside what the student is trained for, {trained}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps must be 1 to {MOST_STEPS}, not {self.steps}")
        if self.grid < MOST_STEPS:
            raise UserError(f"grid must have at least {MOST_STEPS} points, not {self.grid}")
        if self.solver_steps < 1:
            raise UserError(f"solver_steps must be at least 1, not {self.solver_steps}")
        if self.huber_c <= 0:
            raise UserError(f"huber_c must be above 0, not {self.huber_c:g}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay:g}")

    def setup(self, pipeline: Pipeline) -> None:
        process = pipeline.process
        self.times = torch.tensor([*even_times(self.grid * self.solver_steps, process, self.shift), 0.0])
        own = len(self.times.unique()) - 1
        if own < self.grid * self.solver_steps:
            points = f"grid = {self.grid} times solver_steps = {self.solver_steps}"
            raise UserError(f"{points} is finer than the pipeline's own times, of which it meets {own}")
        self.teacher = pipeline.frozen()
        self.student = pipeline.trainable("student", guidance_embedding=self.embed_guidance)
        if self.guidance is not None and not self.student.embeds_guidance:
            raise UserError(f"guidance = {self.guidance:g} needs embed_guidance = true, which gives the student that input")
        if self.student.embeds_guidance:
            scale = pipeline.default_guidance if self.guidance is None else self.guidance
            self.told = min(max(scale, self.guidance_low), self.guidance_high)
        else:
            self.told = 1.0
        self.target: Denoiser | None = None
        if self.ema_decay:
            self.target = pipeline.trainable("target", guidance_embedding=self.embed_guidance).requires_grad_(False)
            if self.target.state_dict().keys() != self.student.state_dict().keys():
                raise UserError('the roles "student" and "target" must both be "full" or both be "lora"')
            self.target.load_state_dict(self.student.state_dict())

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    @property
    def trained(self) -> Denoiser:
        return self.student

    def sampler(self, steps: int | None = None) -> FewStep:
        """The calls fall on the solver grid, on the points that diffusers' LCMScheduler chooses."""
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"a consistency model is sampled in 1 to {MOST_STEPS} steps, not {steps}")
        grid = even_times(self.grid, self.student.process, self.shift)
        times = tuple(grid[i * self.grid // steps] for i in range(steps))
        return FewStep(times, gamma=self.gamma, guidance=self.told)

    def advance(self, step: int, total: int) -> bool:
        if self.target is not None and step > 0:
            with torch.no_grad():
                for average, weight in zip(self.target.parameters(), self.student.parameters(), strict=True):
                    average.lerp_(weight, 1 - self.ema_decay)
        return False

    def state(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()} if self.target else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.target is not None:
            self.target.load_state_dict(state["target"])

    def loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        x0, times = batch.latents, self.times.to(batch.latents.device)
        start = self.solver_steps * torch.randint(self.grid, (len(x0),), device=x0.device)
        t, r = times[start], times[start + self.solver_steps]
        scale = self.guidance_low + (self.guidance_high - self.guidance_low) * torch.rand(len(x0), device=x0.device)
        xt = noised(self.student.process, x0, torch.randn_like(x0), t)
        with torch.no_grad():
            xr = self.solve(xt, times, start, batch.condition, scale)
            target = self.consistency(self.target or self.student, xr, r, batch.condition, scale)
        estimate = self.consistency(self.student, xt, t, batch.condition, scale)
        return {"consistency": pseudo_huber(estimate, target, self.huber_c)}

    def solve(self, x: Tensor, times: Tensor, start: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """The guided teacher's DDIM steps from position `start` [B] on the grid to the next point."""
        guided = Guided(self.teacher, 1.0 if self.guidance_low == self.guidance_high == 1 else scale)
        return walk(guided, x, times, start, self.solver_steps, condition)

    def consistency(self, network: Predicts, x: Tensor, t: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """c_skip x + c_out x0 (LCM, equation 9); `scale` [B] is told to a network that embeds it."""
        x0 = network(x, t, condition, guidance=scale if network.embeds_guidance else None).x0
        tau = (self.timestep_scaling * 1000 * t).view(-1, *[1] * (x.ndim - 1))
        return SIGMA_DATA**2 / (tau**2 + SIGMA_DATA**2) * x + tau / (tau**2 + SIGMA_DATA**2).sqrt() * x0
