"""Gaussian noise processes, and what a network's output means under them.

Every process is x_t = alpha(t) x_0 + sigma(t) eps with eps ~ N(0, I) and t in [0, 1], 1 being noise. Times are float tensors of
shape [B], or of any shape that broadcasts against x_t. Coefficients are computed in double precision and handed out in the
sample's own precision, float32 at least.

Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), v-prediction (Salimans and Ho 2022), EDM (Karras et al. 2022),
rectified flow (Liu et al. 2023; Lipman et al. 2023), dynamic shift (Esser et al. 2024), TrigFlow (Lu and Song 2025).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "flow"]
"""What a network predicts: the clean sample, the noise, v = alpha eps - sigma x0, or the flow velocity eps - x0."""

SMALLEST = 1e-6


def _single(x: Tensor) -> torch.dtype:
    """The precision of `x`, single at least."""
    return torch.promote_types(x.dtype, torch.float32)


class Process(ABC):
    """A forward process; subclasses say alpha and sigma."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The coefficient of the clean sample at time `t`, in the precision of `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The coefficient of the noise at time `t`, in the precision of `t`."""

    @abstractmethod
    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha equals `ratio` (infinity is pure noise), or the nearest end; inverse of `ratio`."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """`t` as diffusers' networks and schedulers count it, float32 at least."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of `timestep`."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha; infinite where there is no signal."""
        return self.sigma(t) / self.alpha(t).clamp_min(0)  # the rounded cosine of pi / 2 is negative

    def initial_scale(self, t: Tensor) -> Tensor:
        """By what unit noise is multiplied to start sampling at `t`; 1 unless the process explodes."""
        return torch.ones_like(t)

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time the network was trained at; every time, for a continuous process."""
        return t

    def coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `t`, shaped to broadcast against `x`, in `x`'s precision but float32 at least."""
        dtype = _single(x)
        wide = t.double().view(t.shape + (1,) * (x.ndim - t.ndim))
        return self.alpha(wide).to(dtype), self.sigma(wide).to(dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from a clean sample and unit noise, both of one shape."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * eps

    def diffuse(self, xs: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """The exact kernel from level `s` to a noisier level `t` >= `s`, with fresh unit noise `eps`."""
        # The variance is a difference of nearly equal numbers where the two levels are close: in double precision.
        wide = xs.new_zeros((), dtype=torch.float64).expand(xs.shape)
        alpha_s, sigma_s = self.coefficients(s, wide)
        alpha_t, sigma_t = self.coefficients(t, wide)
        scale = alpha_t / alpha_s.clamp_min(SMALLEST)
        fresh = (sigma_t**2 - (scale * sigma_s) ** 2).clamp_min(0).sqrt()
        dtype = _single(xs)
        return scale.to(dtype) * xs + fresh.to(dtype) * eps

    def target(self, kind: Kind, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect network of this kind would answer at x_t."""
        alpha, sigma = self.coefficients(t, x0)
        a, b = _combination(kind, alpha, sigma)
        return a * x0 + b * eps


class VP(Process):
    """A variance-preserving process given by a scheduler's table, exact at its integer grid.

    Table index k is time (k + 1) / N, and time 0 is clean data, so diffusers' trailing grid with n steps is t = 1 - i / n.
    Between two entries the angle atan2(sigma, alpha) is interpolated, which is defined for a zero terminal signal too.
    """

    def __init__(self, alphas_cumprod: Tensor):
        """`alphas_cumprod` [N]: the squared signal coefficients of a diffusers scheduler, decreasing, in [0, 1]."""
        squared = alphas_cumprod.detach().double().cpu()
        angle = torch.atan2((1 - squared).sqrt(), squared.sqrt())
        self.steps = len(angle)
        self.angles = torch.cat([angle.new_zeros(1), angle])
        self.last_angle = float(angle[-1])  # a number here: asked of a device, it would be waited for

    def _place(self, t: Tensor) -> Tensor:
        place = t.double() * self.steps
        nearest = place.round()
        # A float32 time is only near its grid point; the grid has to be met exactly, and keep its derivative.
        move = torch.where((place - nearest).abs() < 1e-3, nearest - place, 0.0).detach()
        return (place + move).clamp(0, self.steps)

    def angle(self, t: Tensor) -> Tensor:
        """atan2(sigma, alpha) in radians, in [0, pi / 2], double precision."""
        angles, place = self.angles.to(t.device), self._place(t)
        low = place.floor().long().clamp(max=self.steps - 1)
        return torch.lerp(angles[low], angles[low + 1], place - low)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.angle(t)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self.angle(t)).to(t.dtype)

    def coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _single(x)
        angle = self.angle(t.view(t.shape + (1,) * (x.ndim - t.ndim)))  # once for both
        return torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)

    def time_at(self, ratio: Tensor) -> Tensor:
        angles = self.angles.to(ratio.device)
        angle = torch.atan(ratio.double()).clamp(0, self.last_angle).contiguous()
        high = torch.searchsorted(angles, angle).clamp(1, self.steps)
        place = high - 1 + (angle - angles[high - 1]) / (angles[high] - angles[high - 1])
        return (place / self.steps).to(ratio.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        return (self._place(t) - 1).clamp_min(0).to(_single(t))

    def time(self, timestep: Tensor) -> Tensor:
        return (timestep.double() + 1).div(self.steps).to(_single(timestep))

    def snap(self, t: Tensor) -> Tensor:
        return (t * self.steps).round().clamp(1, self.steps) / self.steps


class Flow(Process):
    """Rectified flow: a straight line from data to noise, alpha = 1 - t and sigma = t."""

    def __init__(self, timesteps: int = 1000):
        """`timesteps`: what the network's time input is at t = 1."""
        self.timesteps = timesteps

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_at(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)

    def timestep(self, t: Tensor) -> Tensor:
        return t.to(_single(t)) * self.timesteps

    def time(self, timestep: Tensor) -> Tensor:
        return timestep / self.timesteps


class Trig(Process):
    """TrigFlow: a quarter circle from data to noise; the network's time input is the angle in [0, pi / 2]."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def time_at(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) / (math.pi / 2)

    def timestep(self, t: Tensor) -> Tensor:
        return t.to(_single(t)) * (math.pi / 2)

    def time(self, timestep: Tensor) -> Tensor:
        return timestep / (math.pi / 2)


class EDM(Process):
    """A variance-exploding process, alpha = 1: sigma on Karras' rho schedule (EDM, equation 5), c_noise = ln(sigma) / 4."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        self.low, self.high, self.rho = sigma_min ** (1 / rho), sigma_max ** (1 / rho), rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (self.low + t * (self.high - self.low)) ** self.rho

    def time_at(self, ratio: Tensor) -> Tensor:
        return ((ratio ** (1 / self.rho) - self.low) / (self.high - self.low)).clamp(0, 1)

    def timestep(self, t: Tensor) -> Tensor:
        return self.sigma(t.to(_single(t))).log() / 4

    def time(self, timestep: Tensor) -> Tensor:
        return self.time_at((timestep * 4).exp())

    def initial_scale(self, t: Tensor) -> Tensor:
        return self.sigma(t)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23); `shift` > 0, 1 is none."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def dynamic_shift(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """FLUX's shift for an image of `tokens` latent tokens: exp(mu) with mu linear in the token count."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))


def _combination(kind: Kind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Every kind of output is a x0 + b eps; these are a and b."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}[kind]


@dataclass
class Prediction:
    """A network's output at (x_t, t), readable as any parameterisation.

    Together with x_t = alpha x0 + sigma eps the output a x0 + b eps is two linear equations in x0 and eps. They are solved in
    float32 or better whatever the network's precision. `features` holds the layers that were asked for.
    """

    output: Tensor
    kind: Kind
    xt: Tensor
    t: Tensor
    process: Process
    features: dict[str, Tensor] | None = None

    def solve(self) -> tuple[Tensor, Tensor]:
        """x0 and eps, both of x_t's shape."""
        alpha, sigma = self.process.coefficients(self.t, self.xt)
        xt, output = self.xt.to(alpha.dtype), self.output.to(alpha.dtype)
        if self.kind == "x0":
            return output, (xt - alpha * output) / sigma.clamp_min(SMALLEST)
        if self.kind == "eps":
            return (xt - sigma * output) / alpha.clamp_min(SMALLEST), output
        a, b = _combination(self.kind, alpha, sigma)
        determinant = alpha * b - sigma * a  # alpha^2 + sigma^2 or alpha + sigma: never small
        return (b * xt - sigma * output) / determinant, (alpha * output - a * xt) / determinant

    @property
    def x0(self) -> Tensor:
        """The clean sample."""
        return self.solve()[0]

    @property
    def eps(self) -> Tensor:
        """The unit noise."""
        return self.solve()[1]

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return self.read_as("v")

    @property
    def flow(self) -> Tensor:
        """The straight velocity eps - x0."""
        return self.read_as("flow")

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t at x_t: -eps / sigma."""
        _, sigma = self.process.coefficients(self.t, self.xt)
        return -self.eps / sigma.clamp_min(SMALLEST)

    def read_as(self, kind: Kind) -> Tensor:
        """The same prediction in another parameterisation."""
        if kind == self.kind:
            return self.output.to(_single(self.output))
        x0, eps = self.solve()
        return self.process.target(kind, x0, eps, self.t)

    def at(self, s: Tensor) -> Tensor:
        """Move deterministically to time `s`: a DDIM step (Song et al. 2021, equation 12, eta 0), Euler's step for a flow."""
        return self.process.add_noise(*self.solve(), s)
