"""The difference of two scores, put on the student's samples as a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.denoiser import Condition, Predicts
from fastgen.losses.distances import wide
from fastgen.losses.readings import record_pull, record_scores


def distribution_matching(
    x: Tensor, t: Tensor, condition: Condition, fake: Predicts, real: Predicts, guidance: Tensor | None = None
) -> Tensor:
    """The distribution matching loss of the student's samples `x` [B, ...] (DMD2, equation 2), noised to times `t` [B].

    `fake` is the fake score and `real` the guided teacher, which is told `guidance` [B] where that is given. Neither gets a
    gradient.
    """
    with torch.no_grad():
        xt = fake.process.add_noise(x, torch.randn_like(x), t)
        estimates = fake(xt, t, condition).x0, real(xt, t, condition, guidance=guidance).x0
    record_scores(x, *estimates, t)
    return contrast(x, *estimates)


def contrast(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The distribution matching gradient as a loss on the student's samples `x` (DMD2, equation 2; DMD, equations 7 and 8).

    `fake` and `real` are the clean estimates of the fake score and of the teacher for x with noise added. The gradient of
    the result with respect to `x` is weight (fake - real) / mean|x - real| over the number of elements, the inner mean over
    each sample; `weight` broadcasts against x. Where that is not finite (a normaliser of zero, an overflow
    in a network) it is zero.
    """
    with torch.no_grad():
        sample = wide(x)
        scale = (sample - wide(real)).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        gradient = weight * (wide(fake) - wide(real)) / scale
    return pull(x, gradient)


def pull(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to `x` is `gradient` over the number of elements, and zero where that is not finite.

    Its value is half the mean square of `gradient`. A sample that is itself not finite is not pulled, and the others are.
    """
    sample = wide(x)
    broken = ~torch.isfinite(sample.detach()).reshape(len(x), -1).all(1).view(-1, *[1] * (x.ndim - 1))
    sample = sample.masked_fill(broken, 0)
    finite = torch.nan_to_num(gradient.detach(), nan=0.0, posinf=0.0, neginf=0.0)
    finite = torch.where(broken, torch.zeros_like(finite), finite)
    record_pull(x, finite)
    return 0.5 * F.mse_loss(sample, (sample - finite).detach())
