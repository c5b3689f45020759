"""The terms that methods share: distances, weights, the score contrast, adversarial losses, and random draws.

Everything is computed in float32 or better, whatever precision the networks run in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from fastgen.denoiser import Condition, Predicts
from fastgen.process import SMALLEST, VP, Process, shift_time

# -- distances and weights ------------------------------------------------------------------------


def squared(prediction: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared error, each element times `weight` (broadcast); `target` gets no gradient."""
    return (weight * (wide(prediction) - wide(target).detach()).square()).mean()


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c over the elements d of the difference (Song and Dhariwal 2024), each times `weight`.

    Quadratic below `c`, absolute above it; `target` gets no gradient.
    """
    difference = wide(prediction) - wide(target).detach()
    # The same number without cancellation: near zero the root and c agree to all digits of float32.
    squares = difference.square()
    return (weight * squares / ((squares + c**2).sqrt() + c)).mean()


def snr(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2 at `t` [B], shaped to broadcast against `like`; finite at t = 0 too."""
    alpha, sigma = process.coefficients(t, like)
    return (alpha / sigma.clamp_min(SMALLEST)).square()


def wide(x: Tensor) -> Tensor:
    """In float32, or its own precision where that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- diffusion ------------------------------------------------------------------------------------


def noised(process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t as a sampler meets it: `add_noise`, but at t = 1 noise alone, whatever signal the process leaves there."""
    start = process.initial_scale(t).view(-1, *[1] * (eps.ndim - 1)) * eps
    return torch.where(t.view(-1, *[1] * (eps.ndim - 1)) >= 1, start, process.add_noise(x0, eps, t)).to(x0.dtype)


def denoising(denoiser: Predicts, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The ordinary diffusion loss in the network's own kind of prediction (DDPM, equation 14, for one that predicts noise)."""
    prediction = denoiser(denoiser.process.add_noise(x0, eps, t).to(x0.dtype), t, condition)
    return squared(prediction.output, denoiser.process.target(prediction.kind, wide(x0), wide(eps), t))


def landing(process: Process, xt: Tensor, t: Tensor, landed: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The x0 and eps, double precision, with which one jump from `xt` at `t` to the less noisy time `end` gives `landed`.

    Two linear equations, alpha x0 + sigma eps = x_t and the same at `end`: the target of progressive distillation (Salimans
    and Ho 2022, appendix G), here for every process.
    """
    xt, landed = xt.double(), landed.double()
    (alpha, sigma), (alpha_end, sigma_end) = process.coefficients(t, xt), process.coefficients(end, xt)
    determinant = (alpha_end * sigma - sigma_end * alpha).clamp_min(SMALLEST)
    return (sigma * landed - sigma_end * xt) / determinant, (alpha_end * xt - alpha * landed) / determinant


def contrast(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """The distribution matching gradient as a loss on the student's samples `x` (DMD2, equation 2; DMD, equations 7 and 8).

    `fake` and `real` are the clean estimates of the fake score and of the teacher for x with noise added. The gradient of
    the result with respect to `x` is (fake - real) / mean|x - real| over the number of elements, the inner mean over each
    sample. Where that is not finite (a normaliser of zero, an overflow in a network) it is zero.
    """
    sample = wide(x)
    with torch.no_grad():
        scale = (sample - wide(real)).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        gradient = torch.nan_to_num((wide(fake) - wide(real)) / scale, nan=0.0, posinf=0.0, neginf=0.0)
        target = sample - gradient
    return 0.5 * F.mse_loss(sample, target)


# -- adversaries ----------------------------------------------------------------------------------


def nonsaturating_critic(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises (Goodfellow et al. 2014): -log of the right answer, from logits where above zero means real."""
    return F.softplus(wide(fake)).mean() + F.softplus(-wide(real)).mean()


def nonsaturating_student(fake: Tensor) -> Tensor:
    """What the student minimises: -log of being taken for real."""
    return F.softplus(-wide(fake)).mean()


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's hinge loss (Lim and Ye 2017), from logits where above zero means real."""
    return F.relu(1 + wide(fake)).mean() + F.relu(1 - wide(real)).mean()


def hinge_student(fake: Tensor) -> Tensor:
    """The student's side of the hinge loss."""
    return -wide(fake).mean()


# -- draws ----------------------------------------------------------------------------------------


def uniform_times(
    process: Process,
    count: int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`count` times, uniform between `low` and `high`, then moved towards noise by `shift`.

    On a table the draw is uniform over its entries; `low` 0.02 and `high` 0.98 of 1,000 are timesteps 20 to 979.
    """
    t = low + (high - low) * torch.rand(count, device=device)
    if shift == 1 and isinstance(process, VP):
        return (t * process.steps).floor().add(1).clamp(max=process.steps) / process.steps
    return process.snap(shift_time(t, shift))


def logit_normal_times(
    process: Process,
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`count` times whose logit is normal (Esser et al. 2024, section 3.1), then moved towards noise by `shift`."""
    return process.snap(shift_time(torch.sigmoid(mean + std * torch.randn(count, device=device)), shift))


def shared_choice(count: int, device: torch.device | str | None = None) -> int:
    """One of `count` positions, the same on every process.

    A draw that decides how many network calls follow has to be shared: sharded networks wait for each other in every call.
    """
    choice = torch.randint(count, (1,), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(choice, 0)
    return int(choice)
