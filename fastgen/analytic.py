"""Teachers with a closed form: Gaussians and mixtures of isotropic Gaussians under any noise process.

For x_0 ~ sum_k w_k N(mu_k, s_k^2 I) the noised density is the mixture of N(alpha mu_k, (alpha^2 s_k^2 + sigma^2) I), so
posterior means, score and, for one component, the probability-flow ODE's map are known exactly. Every distillation method
is held to the answer that it must reach on such a teacher. Labels are subsets of the components, so that guidance has a
closed form too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgen.denoiser import Condition
from fastgen.process import Kind, Prediction, Process

MASK = "components"


class Mixture:
    """A perfect denoiser of a mixture of isotropic Gaussians; usable wherever a `Denoiser` is.

    `weights` [K] positive (normalised here), `means` [K, ...] one sample's shape each, `stds` [K] positive. It answers in
    `kind` and computes in double precision.
    """

    embeds_guidance = False

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Tensor,
        stds: Sequence[float] | Tensor,
        process: Process,
        kind: Kind = "v",
    ):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        if not len(self.weights) == len(self.means) == len(self.stds):
            raise ValueError(f"{len(self.weights)} weights, {len(self.means)} means and {len(self.stds)} stds do not match")
        self.process, self.kind = process, kind

    def condition(self, labels: Sequence[Sequence[int]]) -> Condition:
        """A condition from one subset of the components per sample; its null twin is all components."""
        mask = torch.zeros(len(labels), len(self.weights), dtype=torch.bool)
        for row, label in zip(mask, labels, strict=True):
            row[list(label)] = True
        return Condition({MASK: mask}, null=Condition({MASK: torch.ones_like(mask)}))

    def unconditional(self, count: int) -> Condition:
        """`count` samples of all components."""
        return self.condition([range(len(self.weights))] * count)

    def sample(self, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """One clean sample per row of `condition`, double precision."""
        weights = self.weights * condition.inputs[MASK]
        k = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        noise = torch.randn(len(k), *self.means.shape[1:], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k].view(-1, *[1] * (noise.ndim - 1)) * noise

    def log_density(self, xt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """log p_t(x_t | condition) [B], double precision and differentiable."""
        return torch.logsumexp(self._joint(xt.double(), *self.process.coefficients(t, xt.double()), condition), 1)

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """The Bayes-optimal prediction at `xt` [B, ...] and `t` [B]; it has no features and embeds no guidance.

        Raises ValueError for an `end`, of which it knows nothing.
        """
        if end is not None:
            raise ValueError("a perfect denoiser has no input for the time at which a step ends")
        x0, eps = self._posterior(xt.double(), *self.process.coefficients(t, xt.double()), condition)
        output = self.process.target(self.kind, x0, eps, t)
        return Prediction(output.to(torch.promote_types(xt.dtype, torch.float32)), self.kind, xt, t, self.process)

    def flow_map(
        self, xt: Tensor, t: Tensor, s: Tensor, condition: Condition, guidance: float | Tensor = 1.0, steps: int = 256
    ) -> Tensor:
        """Where the probability-flow ODE carries `xt` from time `t` to time `s`, both [B]; double precision.

        Closed form for one component. Else the classical Runge-Kutta method in the angle atan2(sigma, alpha), in which
        every process is dz / dangle = cos eps - sin x0 for z = x / sqrt(alpha^2 + sigma^2), smooth at both ends; its error
        falls with the fourth power of `steps`. `guidance` is classifier-free, in the diffusers convention.
        """
        x = xt.double()
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.process.coefficients(t, x), self.process.coefficients(s, x)
        if len(self.weights) == 1:
            mean, variance = self.means[0].to(x), float(self.stds[0]) ** 2
            spread = ((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2)).sqrt()
            return alpha_s * mean + (x - alpha_t * mean) * spread
        scale = torch.as_tensor(guidance, dtype=torch.float64, device=x.device).view(-1, *[1] * (x.ndim - 1))
        guided = condition.null is not None and bool((scale != 1).any())

        def slope(z: Tensor, angle: Tensor) -> Tensor:
            cos, sin = angle.cos(), angle.sin()
            x0, eps = self._posterior(z, cos, sin, condition)
            v = cos * eps - sin * x0
            if guided and condition.null is not None:
                x0, eps = self._posterior(z, cos, sin, condition.null)
                v_null = cos * eps - sin * x0
                v = v_null + scale * (v - v_null)
            return v

        z, angle = x / (alpha_t**2 + sigma_t**2).sqrt(), torch.atan2(sigma_t, alpha_t)
        h = (torch.atan2(sigma_s, alpha_s) - angle) / steps
        for _ in range(steps):
            first = slope(z, angle)
            second = slope(z + h / 2 * first, angle + h / 2)
            third = slope(z + h / 2 * second, angle + h / 2)
            fourth = slope(z + h * third, angle + h)
            z, angle = z + h / 6 * (first + 2 * second + 2 * third + fourth), angle + h
        return z * (alpha_s**2 + sigma_s**2).sqrt()

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """log of weight times density of each component [B, K]; minus infinity for components outside the condition."""
        mask = condition.inputs[MASK].to(x.device)
        weights = self.weights.to(x.device) * mask
        weights = weights / weights.sum(1, keepdim=True)
        distance = (x[:, None] - alpha[:, None] * self.means.to(x)).square().flatten(2).sum(2)  # [B, K]
        variance = (alpha**2).flatten(1)[:, :1] * self.stds.to(x) ** 2 + (sigma**2).flatten(1)[:, :1]
        size = x[0].numel()
        return weights.log() - 0.5 * (distance / variance + size * (2 * math.pi * variance).log())

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[eps | x_t], neither by dividing by alpha or sigma."""
        alpha, sigma = (c.expand(len(x), *[1] * (x.ndim - 1)) for c in (alpha, sigma))
        share = torch.softmax(self._joint(x, alpha, sigma, condition), 1)
        share = share.view(*share.shape, *[1] * (x.ndim - 1))
        variance = (self.stds.to(x) ** 2).view(1, -1, *[1] * (x.ndim - 1))
        a, b, means = alpha[:, None], sigma[:, None], self.means.to(x)
        pull = (x[:, None] - a * means) / (a**2 * variance + b**2)
        return (share * (means + a * variance * pull)).sum(1), (share * b * pull).sum(1)


class Gaussian(Mixture):
    """A perfect denoiser of N(mean, std^2 I); `mean` has one sample's shape."""

    def __init__(self, mean: Tensor, std: float, process: Process, kind: Kind = "v"):
        super().__init__([1.0], torch.as_tensor(mean)[None], [std], process, kind)


class Exact:
    """The perfect few-step student of a `Mixture`: its jump from `t` lands exactly where the ODE is at the end of the step.

    That is the time it is told in a call, or else `end(t)`. With the default, time 0, it is the consistency function; told no
    step at all (`end` is t itself) it answers as the teacher does.
    """

    embeds_guidance, takes_end = False, True

    def __init__(
        self,
        teacher: Mixture,
        end: Callable[[Tensor], Tensor] = torch.zeros_like,
        guidance: float | Tensor = 1.0,
        kind: Kind = "x0",
    ):
        self.teacher, self.end, self.guidance, self.kind = teacher, end, guidance, kind
        self.process = teacher.process

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """As `Denoiser.forward`; `guidance` is not looked at."""
        end = self.end(t) if end is None else end
        landed = self.teacher.flow_map(xt, t, end, condition, self.guidance)
        # On the circle of `flow_map` a jump is the rotation z_end = cos(turn) z - sin(turn) v, which is solved for v.
        # Its limit for no turn at all is the teacher's v.
        (alpha, sigma), (alpha_end, sigma_end) = (self.process.coefficients(at, landed) for at in (t, end))
        z, z_end = (x / (a**2 + b**2).sqrt() for x, a, b in ((xt.double(), alpha, sigma), (landed, alpha_end, sigma_end)))
        angle = torch.atan2(sigma, alpha)
        turn = angle - torch.atan2(sigma_end, alpha_end)
        v = (turn.cos() * z - z_end) / torch.where(turn > 0, turn.sin(), 1.0)
        x0, eps = self.teacher(xt.double(), t, condition).solve()
        v = torch.where(turn > 0, v, angle.cos() * eps - angle.sin() * x0)
        x0, eps = angle.cos() * z - angle.sin() * v, angle.sin() * z + angle.cos() * v
        output = self.process.target(self.kind, x0, eps, t)
        return Prediction(output.to(torch.promote_types(xt.dtype, torch.float32)), self.kind, xt, t, self.process)
