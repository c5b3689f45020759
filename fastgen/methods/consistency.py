"""Consistency models: distilled from a teacher's trajectories, or trained without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.families.consistency import Chain, Consistency
from fastgen.losses import noised, pseudo_huber
from fastgen.method import Batch, Loss


@dataclass
class ConsistencyModel(Consistency):
    """Consistency models (Song et al. 2023); without a teacher as in iCT (Song and Dhariwal 2024) and ECT (Geng et al. 2025).

    With a teacher, its steps down the grid are Heun's, and the student's x0 is held constant along them (algorithm 2). Without
    one (`teacher = false`) both points are the same data with the same noise, at noise-to-signal ratios rho_t, log-normal, and
    rho_r = rho_t (1 - (1 + 8 sigmoid(-rho_t)) / 2^(stage + 1)), no less than 0, which come nearer to each other from stage to
    stage; the loss is weighted with 1 / (rho_t - rho_r). A student of the second kind needs prompts dropped in training to be
    guided in sampling.

    Differences from the authors' code: Heun's method goes by the angle atan2(sigma, alpha), not by EDM's sigma, and is exact,
    as DDIM is, where clean estimate and noise do not change; the distance is pseudo-Huber's by elements, not LPIPS; ratios for
    data of unit deviation are drawn (`mean` is ECT's plus ln 2), and those beyond the end of a noise table are moved to its
    end. As theirs, the last step, to clean data, is of first order.
    """

    teacher: bool = field(default=True, metadata={"help": "distil the pipeline; false: train its student on data alone"})
    solver: Literal["heun", "ddim"] = field(default="heun", metadata={"help": "the teacher's method, of second or first order"})
    guidance_low: float = field(default=1.0, metadata={"help": "least guidance scale of the teacher, 1 = off"})
    guidance_high: float = field(default=1.0, metadata={"help": "greatest guidance scale of the teacher"})
    steps: int = field(default=2, metadata={"help": "network calls a sample, 1 to 8"})
    grid: int = field(default=40, metadata={"help": "points of the solver grid"})
    ema_decay: float = field(
        default=0.95, metadata={"help": "decay of the target network; 0: the student itself, as without a teacher"}
    )
    gamma: float = field(
        default=1.0, metadata={"help": "share of noise renewed between calls in sampling, 0 to 1", "at_least": 0, "at_most": 1}
    )
    mean: float = field(default=-0.4, metadata={"help": "without a teacher: mean of the log of the noise-to-signal ratio"})
    std: float = field(default=2.0, metadata={"help": "without a teacher: deviation of that logarithm", "above": 0})
    halvings: int = field(
        default=8, metadata={"help": "without a teacher: stages, each halving the distance", "at_least": 1, "at_most": 10}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage = 0
        if not self.teacher and self.guidance_high > 1:
            raise UserError(
                f"guidance_high = {self.guidance_high:g} guides a teacher, and teacher = false leaves none; set it to 1"
            )
        if not self.teacher and self.embed_guidance:
            raise UserError("embed_guidance = true needs a guided teacher, and teacher = false leaves none")
        if not self.teacher and self.ema_decay:
            raise UserError(
                f"ema_decay = {self.ema_decay:g} makes an average the target, which without a teacher is the student itself; "
                "with teacher = false set it to 0"
            )

    @property
    def renewal(self) -> float:
        return self.gamma

    def advance(self, step: int, total: int) -> bool:
        self.stage = step * self.halvings // total
        return super().advance(step, total)

    def end(self, start: Tensor) -> Tensor:
        return self.times[-1].expand(len(start))

    def solve(self, x: Tensor, start: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        if self.solver == "ddim":
            return super().solve(x, start, condition, scale)
        process, guided = self.student.process, self.guided(scale)
        for i in range(self.solver_steps):
            t, r = self.times[start + i], self.times[start + i + 1]
            first = guided(x, t, condition)
            landed = first.at(r)
            # By the angle atan2(sigma, alpha) every process moves along v; DDIM keeps the first x0 and noise on the way.
            turn = self.angle(r, landed) - self.angle(t, landed)
            bend = guided(landed.to(x.dtype), r, condition).v - process.target("v", *first.solve(), r)
            inside = (r > 0).view(-1, *[1] * (x.ndim - 1))
            x = torch.where(inside, landed + turn / 2 * bend, landed).to(x.dtype)
        return x

    def angle(self, t: Tensor, like: Tensor) -> Tensor:
        """atan2(sigma, alpha) at `t` [B], shaped to broadcast against `like`."""
        alpha, sigma = self.student.process.coefficients(t, like)
        return torch.atan2(sigma, alpha)

    def chain(self, batch: Batch) -> Chain:
        if self.teacher:
            return super().chain(batch)
        assert batch.latents is not None
        x0, process, condition = batch.latents, self.student.process, batch.condition
        t, r = self.draw(len(x0), x0.device)
        if self.prompt_dropout:
            condition = condition.dropout(torch.rand(len(x0), device=x0.device) < self.prompt_dropout)
        eps = torch.randn_like(x0)
        xt, xr = noised(process, x0, eps, t), process.add_noise(x0, eps, r).to(x0.dtype)
        return Chain(xt, t, xr, r, torch.zeros_like(t), condition, torch.ones_like(t))

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`count` pairs of times t and r < t whose ratios are those of the present stage."""
        process = self.student.process
        most = process.ratio(torch.ones((), device=device, dtype=torch.float64))
        rho = (self.mean + self.std * torch.randn(count, device=device).double()).exp().clamp(max=most)
        nearer = rho * (1 - (1 + 8 * torch.sigmoid(-rho)) / 2 ** (self.stage + 1)).clamp_min(0)
        return process.time_at(rho).float(), process.time_at(nearer).float()

    def loss(self, batch: Batch) -> Loss:
        if self.teacher:
            return super().loss(batch)
        chain = self.chain(batch)
        estimate, target = self.meet(chain)
        process = self.student.process
        apart = process.ratio(chain.t.double()) - process.ratio(chain.r.double())
        weight = (1 / apart).float().view(-1, *[1] * (estimate.ndim - 1))
        return {"consistency": pseudo_huber(estimate, target, self.huber_c, weight)}
