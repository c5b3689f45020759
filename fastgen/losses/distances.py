"""Distances between a prediction and its target, and weights for them; float32 or better whatever the networks run in."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.process import SMALLEST, Process


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


def distance(prediction: Tensor, target: Tensor, huber_c: float = 0.0, weight: Tensor | float = 1.0) -> Tensor:
    """`squared`, or with `huber_c` above 0 `pseudo_huber`."""
    return pseudo_huber(prediction, target, huber_c, weight) if huber_c else squared(prediction, target, weight)


def snr(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2 at `t` [B], shaped to broadcast against `like`; finite at t = 0 too."""
    alpha, sigma = process.coefficients(t, like)
    return (alpha / sigma.clamp_min(SMALLEST)).square()


def wide(x: Tensor) -> Tensor:
    """In float32, or its own precision where that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
