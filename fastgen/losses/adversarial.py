"""What critics and students minimise against one another, from logits where above zero means real."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.losses.distances import wide
from fastgen.losses.readings import record_answers

Times = Tensor | Sequence[Tensor] | None
"""When a critic was shown real and fake samples [B], or a pair of such times; for readings alone."""


def nonsaturating_critic(real: Tensor, fake: Tensor, t: Times = None) -> Tensor:
    """What the critic minimises (Goodfellow et al. 2014): -log of the right answer, from logits where above zero means real."""
    record_answers(real, fake, t)
    return F.softplus(wide(fake)).mean() + F.softplus(-wide(real)).mean()


def nonsaturating_student(fake: Tensor) -> Tensor:
    """What the student minimises: -log of being taken for real."""
    return F.softplus(-wide(fake)).mean()


def hinge_critic(real: Tensor, fake: Tensor, t: Times = None) -> Tensor:
    """The critic's hinge loss (Lim and Ye 2017), from logits where above zero means real."""
    record_answers(real, fake, t)
    return F.relu(1 + wide(fake)).mean() + F.relu(1 - wide(real)).mean()


def hinge_student(fake: Tensor) -> Tensor:
    """The student's side of the hinge loss."""
    return -wide(fake).mean()


def least_squares_critic(real: Tensor, fake: Tensor, t: Times = None) -> Tensor:
    """The critic's least squares (Mao et al. 2017): 1 for real, 0 for fake."""
    record_answers(real, fake, t, threshold=0.5)
    return 0.5 * ((wide(real) - 1).square().mean() + wide(fake).square().mean())


def least_squares_student(fake: Tensor) -> Tensor:
    """The student's side of least squares: to be given a 1."""
    return 0.5 * (wide(fake) - 1).square().mean()


def approximate_r1(critic: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor, noise: float = 0.1) -> Tensor:
    """Squared change of the `logits` of real samples `x` under a little noise: R1 without second derivatives.

    Its expectation is noise^2 times the squared gradient to first order (APT, Lin et al. 2025, equation 3). Weights are 100
    to 1000 there.
    """
    moved = critic(x + noise * torch.randn_like(x))
    return (wide(logits) - wide(moved)).square().mean()
