"""Walks along a grid of times: what teachers do between two points of a student, and students between two of their own."""

from __future__ import annotations

from torch import Tensor

from fastgen.denoiser import Condition, Predicts


def walk(
    denoiser: Predicts,
    x: Tensor,
    times: Tensor,
    start: Tensor,
    steps: int,
    condition: Condition,
    guidance: Tensor | None = None,
) -> Tensor:
    """`steps` DDIM steps (Euler steps, for a flow) down the grid `times` [G], each sample from its own position.

    `x` [B, ...] is at `times[start]`, `start` [B] integer; the answer, in x's precision, at `times[start + steps]`. `guidance`
    [B] is handed to every call. Calls are made with gradient if gradients are enabled.
    """
    for i in range(steps):
        x = denoiser(x, times[start + i], condition, guidance=guidance).at(times[start + i + 1]).to(x.dtype)
    return x
