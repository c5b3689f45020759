"""Inputs and targets of denoising: noised data, the ordinary diffusion loss, what one jump has to predict to land somewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Predicts
from fastgen.losses.distances import squared, wide
from fastgen.process import SMALLEST, Process


def noised(process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t as a sampler meets it: `add_noise`, but at t = 1 noise alone, whatever signal the process leaves there."""
    start = process.initial_scale(t).view(-1, *[1] * (eps.ndim - 1)) * eps
    return torch.where(t.view(-1, *[1] * (eps.ndim - 1)) >= 1, start, process.add_noise(x0, eps, t)).to(x0.dtype)


def denoising(
    denoiser: Predicts, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition, weight: Tensor | float = 1.0
) -> Tensor:
    """The ordinary diffusion loss in the network's own kind of prediction (DDPM, equation 14, for one that predicts noise).

    Each element's square is multiplied with `weight` (broadcast).
    """
    prediction = denoiser(denoiser.process.add_noise(x0, eps, t).to(x0.dtype), t, condition)
    return squared(prediction.output, denoiser.process.target(prediction.kind, wide(x0), wide(eps), t), weight)


def level_target(process: Process, xs: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The x0 and eps whose means given x_t are those of a perfect denoiser, where only the noisy x_s is known.

    `eps` is the fresh noise of x_t = `process.diffuse(xs, eps, s, t)`, `t` > `s`. From the score of a marginal being the mean
    of the kernel's: eps* = sigma_t / sigma_(t|s) eps, and x0* what x_t leaves. At s = 0 they are the clean sample and the
    noise. The flow form of it is the target of Phased DMD (Fan et al. 2025).
    """
    scale, fresh = kernel(process, s, t, xs)
    _, sigma = process.coefficients(t, xs)
    alpha_s, sigma_s = process.coefficients(s, xs)
    known = wide(xs) / alpha_s.clamp_min(SMALLEST)
    noise = wide(eps) / fresh.clamp_min(SMALLEST)
    return known - scale * sigma_s**2 / alpha_s.clamp_min(SMALLEST) * noise, sigma * noise


def kernel(process: Process, s: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_(t|s) and sigma_(t|s), with which x_t = alpha_(t|s) x_s + sigma_(t|s) eps, shaped to broadcast against `like`."""
    one = like.new_ones((1,) * like.ndim, dtype=torch.float64).expand(len(like), *[1] * (like.ndim - 1))
    dtype = torch.promote_types(like.dtype, torch.float32)
    zero = torch.zeros_like(one)
    return process.diffuse(one, zero, s, t).to(dtype), process.diffuse(zero, one, s, t).to(dtype)


def level_denoising(
    denoiser: Predicts, xs: Tensor, eps: Tensor, s: Tensor, t: Tensor, condition: Condition, most: float = 10.0
) -> Tensor:
    """The diffusion loss of a denoiser of samples known at level `s` alone; `denoising` where s is 0.

    The weight min(1, `most` sigma_(t|s)^2) keeps the target's variance finite where t comes near to s.
    """
    process = denoiser.process
    prediction = denoiser(process.diffuse(xs, eps, s, t).to(xs.dtype), t, condition)
    weight = (most * kernel(process, s, t, xs)[1].square()).clamp_max(1)
    return squared(prediction.output, process.target(prediction.kind, *level_target(process, xs, eps, s, t), t), weight)


def landing(process: Process, xt: Tensor, t: Tensor, landed: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The x0 and eps, double precision, with which one jump from `xt` at `t` to the less noisy time `end` gives `landed`.

    Two linear equations, alpha x0 + sigma eps = x_t and the same at `end`: the target of progressive distillation (Salimans
    and Ho 2022, appendix G), here for every process.
    """
    xt, landed = xt.double(), landed.double()
    (alpha, sigma), (alpha_end, sigma_end) = process.coefficients(t, xt), process.coefficients(end, xt)
    determinant = (alpha_end * sigma - sigma_end * alpha).clamp_min(SMALLEST)
    return (sigma * landed - sigma_end * xt) / determinant, (alpha_end * xt - alpha * landed) / determinant
